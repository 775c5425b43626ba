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
from sparsify.nn.attention import Execution, attention_modules
from sparsify.nn.execution import check_execution, sparse_form
from sparsify.ops import backends
from sparsify.processes import Compute, Listener

EVAL_BATCH = 32  # images computed together


@dataclass
class _Part:
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
    compute: Compute | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Runs both models over `batches` of images [B, C, H, W] and labels [B], in this process alone.

    Args:
        sparse, dense: on the device and in the dtype of `compute` already, eval mode. dense: None leaves every dense
            figure None.
        compute: None: CPU, float32, and the model's own backend and kernel precision. Never a dense fallback.
        progress: called with the number of images done.
    """
    return _whole([_part(sparse, dense, batches, compute or own_compute(sparse), progress)])


def own_compute(model: nn.Module) -> Compute:
    """On the CPU in float32, with the backend and the kernel precision that `model` has."""
    execution = next((module.execution for module in attention_modules(model).values()), Execution())
    return Compute(backend=execution.backend, kernel_precision=execution.precision)


@torch.inference_mode()
def _part(
    sparse: nn.Module,
    dense: nn.Module | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    compute: Compute,
    progress: Callable[[int], None],
) -> _Part:
    host = sparse if dense is None else dense
    classifier = bool(getattr(host, "num_classes", 0))
    sums = Logits() if classifier else Features(int(getattr(host, "num_prefix_tokens", 0)))
    models = {"sparse": sparse} if dense is None else {"sparse": sparse, "dense": dense}
    part = _Part(sums, 0, dict.fromkeys(models, 0.0))
    with sparse_form(sparse, compute.backend, compute.kernel_precision):
        for x, y in batches:
            if not len(x):
                continue
            x = x.to(compute.torch_device, compute.torch_dtype)
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


def _whole(parts: Sequence[_Part]) -> Evaluation:
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
    strict: bool = False,
    compute: Compute = Compute(),
    listener: Listener = Listener(),
) -> Evaluation:
    """Evaluates a sparse model and its dense original on a labelled folder or data set.

    Of several processes every one must call it; the images are shared out, and `cuda` is a GPU of its own for each.

    Args:
        model: sparse; it is moved to the device and dtype of `compute`, and `dense` with it.
        images: see `sparsify.images.datasets.labelled`.
        dense: the original. None: the model's own weights without sparsity, which are the original's if it was only
            calibrated; with `backbone_changed` no dense model, and no dense figures.
        name: name of the model in the results.
        strict: an image that cannot be read is an error.
        compute: batch_size: 32 images if None; micro_batch has no effect. Never a dense fallback.

    Raises:
        UsageError: an unknown dtype, backend or precision, a backend that cannot be used here, or a dense model that
            cannot be compared with this one.
        BadData: no images, no labels, or classes that do not fit the model's.
    """
    compute = replace(compute, device=processes.local_device(compute.device))
    device, dtype = compute.torch_device, compute.torch_dtype
    check_execution(  # before anything is read
        Execution(compute.backend, compute.kernel_precision), device, dtype, hosts.biased(model)
    )
    if dense is not None:
        graft.check_original(dense, model)
    config = datasets.data_config(model)

    processes.start(compute.device)
    with processes.agree():
        loader = datasets.labelled(
            images,
            int(getattr(model, "num_classes", 0)),
            datasets.transform(config),
            compute.batch_size or EVAL_BATCH,
            compute.workers,
            strict=strict,
        )
        if loader.note:
            listener.say(loader.note)
        if note := backends.note(compute.backend, device, dtype, hosts.biased(model)):
            listener.say(note)
        sparse = model.to(device, dtype).eval()
        if dense is None and not backbone_changed:
            dense = graft.dense_twin(sparse)
        dense = None if dense is None else dense.to(device, dtype).eval()
        share, total, every = sharing.share(loader), loader.total, processes.world()

        def progress(done: int) -> None:
            listener.progress("eval", done * every if total is None else min(done * every, total), total)

        part = _part(sparse, dense, share, compute, progress)
        part.broken, part.first_broken = share.broken, share.first_broken
    parts = processes.gather(part)
    broken, first = sum(part.broken for part in parts), next((p.first_broken for p in parts if p.first_broken), "")
    result = _whole(parts)
    if not result.images:
        raise BadData(
            f"{images}: none of the {broken} images could be read" + (f"; the first: {first}" if first else "")
        )
    if broken:
        listener.say(f"{broken} images could not be read and are left out; the first: {first}")
    return replace(
        result,
        model=name,
        param_count=sum(p.numel() for p in model.parameters()),
        img_size=int(config["input_size"][-1]),
        crop_pct=float(config["crop_pct"]),
        interpolation=config["interpolation"],
    )
