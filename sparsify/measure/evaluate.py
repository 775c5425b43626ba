"""Accuracy of a sparse model and of its dense original, and how far they agree, in one pass over labelled images.

The sparse form is always computed: there is no dense fallback here. All percentages run from 0 to 100. Of several processes
(`sparsify.processes`) each computes its share of the images, and all get the figures of the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify import processes
from sparsify.errors import BadData
from sparsify.images import datasets, sharing
from sparsify.measure.accuracy import Evaluation, Features, Logits
from sparsify.nn import graft, hosts
from sparsify.nn.attention import Execution
from sparsify.nn.execution import check_execution, sparse_form
from sparsify.ops import backends


@dataclass
class Found:
    """What one process found: sums over its images, how many they are, and the seconds of each model."""

    sums: Logits | Features
    images: int
    seconds: dict[str, float]
    broken: int = 0
    first_broken: str = ""


@torch.inference_mode()
def evaluate(
    sparse: nn.Module,
    dense: nn.Module | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda done: None,
    backend: str | None = None,
    kernel_precision: str | None = None,
) -> Evaluation:
    """Runs both models over `batches` of images [B, C, H, W] and labels [B], in this process alone.

    Args:
        sparse, dense: on `device` and in `dtype` already, eval mode. dense: None leaves every dense figure None.
        progress: called with the number of images done.
        backend, kernel_precision: see `sparsify.nn.attention.Execution`; None: the model's own. Never a dense fallback.
    """
    return _whole([_part(sparse, dense, batches, device, dtype, progress, backend, kernel_precision)])


@torch.inference_mode()
def _part(
    sparse: nn.Module, dense: nn.Module | None, batches: Iterable[tuple[Tensor, Tensor]], device: str | torch.device,
    dtype: torch.dtype, progress: Callable[[int], None], backend: str | None, kernel_precision: str | None,
) -> Found:  # fmt: skip
    host = sparse if dense is None else dense
    classifier = bool(getattr(host, "num_classes", 0))
    sums = Logits() if classifier else Features(int(getattr(host, "num_prefix_tokens", 0)))
    models = {"sparse": sparse} if dense is None else {"sparse": sparse, "dense": dense}
    part = Found(sums, 0, dict.fromkeys(models, 0.0))
    with sparse_form(sparse, backend, kernel_precision):
        for x, y in batches:
            if not len(x):
                continue
            x = x.to(device, dtype)
            out: dict[str, Any] = {}
            order = list(models)
            for name in order if part.images // len(x) % 2 else order[::-1]:
                model = cast(Any, models[name])
                start = time.perf_counter()
                out[name] = model(x) if classifier else model.forward_features(x)
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                part.seconds[name] += time.perf_counter() - start
                if not classifier:
                    out[name] = model.forward_head(out[name], pre_logits=True), out[name]
            sums.add(out.get("dense"), out["sparse"], y)
            part.images += len(x)
            progress(part.images)
    return part


def _whole(parts: Sequence[Found]) -> Evaluation:
    """The figures over the images of all parts."""
    images = sum(part.images for part in parts)
    if not images:
        return Evaluation()
    sums = cast(Any, parts[0].sums)
    for other in parts[1:]:
        sums.merge(other.sums)
    rate = {name: sum(part.images / part.seconds[name] for part in parts if part.images) for name in parts[0].seconds}
    return replace(
        sums.result(images), images=images, broken=sum(part.broken for part in parts),
        throughput_sparse=rate["sparse"], throughput_dense=rate.get("dense"),
    )  # fmt: skip


def evaluate_images(
    model: nn.Module,
    images: str,
    *,
    dense: nn.Module | None = None,
    backbone_changed: bool = False,
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
    """Evaluates a sparse model and its dense original on a labelled folder or data set.

    Of several processes every one must call it; the images are shared out, and `cuda` is a GPU of its own for each.

    Args:
        model: sparse; it is moved to `device` and `dtype`, and `dense` with it.
        images: see `sparsify.images.datasets.labelled`.
        dense: the original. None: the model's own weights without sparsity, which are the original's if it was calibrated
            only; with `backbone_changed` no dense model, and no dense figures.
        name: name of the model in the results.
        strict: an image that cannot be read is an error.
        backend, kernel_precision: see `evaluate`.

    Raises:
        UsageError: an unknown backend or precision, a backend that cannot be used here, or a dense model that cannot be
            compared with this one.
        BadData: no images, no labels, or classes that do not fit the model's.
    """
    device = processes.local_device(device)
    execution = Execution(backend or "auto", kernel_precision or "input")
    check_execution(execution, torch.device(device), dtype, hosts.biased(model))  # before anything is read
    if dense is not None:
        graft.check_original(dense, model)
    config = datasets.data_config(model)

    processes.start(device)
    with processes.agree():
        classes = int(getattr(model, "num_classes", 0))
        loader = datasets.labelled(images, classes, datasets.transform(config), batch_size, workers, strict=strict)
        if loader.note:
            say(loader.note)
        if note := backends.note(backend or "auto", torch.device(device), dtype, hosts.biased(model)):
            say(note)
        sparse = model.to(device, dtype).eval()
        if dense is None and not backbone_changed:
            dense = graft.dense_twin(sparse)
        share, total, every = sharing.share(loader), loader.total, processes.world()
        part = _part(
            sparse, None if dense is None else dense.to(device, dtype).eval(), share, device, dtype,
            lambda done: progress(done * every if total is None else min(done * every, total), total),
            backend, kernel_precision,
        )  # fmt: skip
        part.broken, part.first_broken = share.broken, share.first_broken
    parts = processes.gather(part)
    broken, first = sum(part.broken for part in parts), next((p.first_broken for p in parts if p.first_broken), "")
    result = _whole(parts)
    if not result.images:
        raise BadData(
            f"{images}: none of the {broken} images could be read" + (f"; the first: {first}" if first else "")
        )
    if broken:
        say(f"{broken} images could not be read and are left out; the first: {first}")
    return replace(
        result, model=name, param_count=sum(p.numel() for p in model.parameters()),
        img_size=int(config["input_size"][-1]), crop_pct=float(config["crop_pct"]), interpolation=config["interpolation"],
    )  # fmt: skip
