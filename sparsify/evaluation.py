"""Accuracy of a sparse model and of its dense original, and how far they agree, in one pass over labelled images.

The sparse form is always computed: there is no dense fallback here. All percentages run from 0 to 100.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsify import data
from sparsify.metrics import Evaluation, Features, Logits
from sparsify.nn import graft
from sparsify.ops import backends
from sparsify.ops.spec import Execution


@torch.inference_mode()
def evaluate(
    sparse: nn.Module,
    dense: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda done: None,
    backend: str | None = None,
    kernel_precision: str | None = None,
) -> Evaluation:
    """Runs both models over `batches` of images [B, C, H, W] and labels [B].

    Args:
        sparse, dense: on `device` and in `dtype` already, eval mode.
        progress: called with the number of images done.
        backend, kernel_precision: see `sparsify.ops.spec.Execution`; None: the model's own. Never a dense fallback.
    """
    with graft.sparse_form(sparse, backend, kernel_precision):
        return _evaluate(sparse, dense, batches, device, dtype, progress)


def _evaluate(
    sparse: nn.Module, dense: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: str | torch.device,
    dtype: torch.dtype, progress: Callable[[int], None],
) -> Evaluation:  # fmt: skip
    classifier = bool(getattr(dense, "num_classes", 0))
    measure = Logits() if classifier else Features(int(getattr(dense, "num_prefix_tokens", 0)))
    clock = {"sparse": 0.0, "dense": 0.0}
    done = 0
    for x, y in batches:
        if not len(x):
            continue
        x = x.to(device, dtype)
        order = (("dense", dense), ("sparse", sparse)) if done // len(x) % 2 else (("sparse", sparse), ("dense", dense))
        out = {}
        for name, model in order:
            start = time.perf_counter()
            out[name] = model(x) if classifier else model.forward_features(x)  # type: ignore[operator]
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            clock[name] += time.perf_counter() - start
        if not classifier:
            out = {n: (m.forward_head(out[n], pre_logits=True), out[n]) for n, m in order}  # type: ignore[operator]
        measure.add(out["dense"], out["sparse"], y)
        done += len(x)
        progress(done)
    if not done:
        return Evaluation()
    rate = {name: done / seconds for name, seconds in clock.items()}
    return replace(measure.result(done), images=done, throughput_dense=rate["dense"], throughput_sparse=rate["sparse"])


def evaluate_images(
    model: nn.Module,
    images: str,
    *,
    name: str = "",
    batch_size: int = 32,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    strict: bool = False,
    backend: str | None = None,
    kernel_precision: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluates a sparse model and the same weights without sparsity on a labelled folder or data set.

    Args:
        model: sparse, its backbone unchanged (calibrated only), so that its own weights are the dense original's.
        images: see `sparsify.data.labelled`.
        name: name of the model in the results.
        strict: an image that cannot be read is an error.
        backend, kernel_precision: see `evaluate`.

    Raises:
        UsageError: an unknown backend or precision, or a backend that cannot be used here.
        BadData: no images, no labels, or classes that do not fit the model's.
    """
    execution = Execution(backend or "auto", kernel_precision or "input")
    graft.check_execution(execution, torch.device(device), dtype)  # before anything is read
    config = data.data_config(model)
    classes = int(getattr(model, "num_classes", 0))
    loader = data.labelled(images, classes, data.transform(config), batch_size, workers, strict=strict)
    if loader.note:
        say(loader.note)
    if note := backends.note(backend or "auto", torch.device(device), dtype):
        say(note)
    sparse = model.to(device, dtype).eval()
    dense = graft.dense_twin(sparse)
    result = evaluate(
        sparse, dense, loader, device, dtype, lambda done: progress(done, loader.total), backend, kernel_precision
    )
    if loader.broken:
        say(f"{loader.broken} images could not be read and are left out; the first: {loader.first_broken}")
    return replace(
        result, model=name, broken=loader.broken, param_count=sum(p.numel() for p in model.parameters()),
        img_size=int(config["input_size"][-1]), crop_pct=float(config["crop_pct"]), interpolation=config["interpolation"],
    )  # fmt: skip
