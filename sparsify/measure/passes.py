"""One pass of several models over the same images: what they answer, summed up, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as data_field
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyError
from sparsify.images.loaders import Flaws
from sparsify.measure import neighbours
from sparsify.measure.accuracy import Evaluation, Features, Logits
from sparsify.processes import Compute

DENSE, SPARSE = "dense", "sparse"  # names of models in a pass

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images [B, C, H, W] and labels int64 [B], -1 for none."""


def compare(
    dense: nn.Module,
    sparse: Mapping[str, nn.Module],
    batches: Batches,
    compute: Compute,
    progress: Callable[[int], None],
    searched: neighbours.Progress = neighbours.nothing,
) -> dict[str, Evaluation]:
    """Every sparse model, as it executes now, beside the dense one, which computes once; throughput is not measured.

    progress, searched: see `run_pass` and `figures_of`.

    Raises `SparsifyError` if there are no images.
    """
    summed = run_pass({DENSE: dense, **sparse}, batches, compute, progress)
    if not summed.images:
        raise SparsifyError("there are no images to evaluate on")
    return {name: figures_of([summed], name, searched) for name in sparse}


@dataclass
class Pass:
    """Sums of one process over its images."""

    sums: dict[str, Logits | Features]  # of each sparse model, by name
    seconds: dict[str, float]  # of each model, the dense one among them
    images: int = 0
    twice: int = 0  # of these, the ones that an adaptive model ran twice
    flaws: Flaws = data_field(default_factory=Flaws)


@torch.inference_mode()
def run_pass(
    models: Mapping[str, nn.Module],
    batches: Batches,
    compute: Compute,
    progress: Callable[[int], None] = lambda done: None,
) -> Pass:
    """Sums up one pass of all models over the images; `progress` is called with the number of images done.

    models: on the device and in the dtype of `compute`, eval mode; sparse ones by name, before them 'dense' if there is one.
    """
    host = next(iter(models.values()))
    classifier, compared = bool(getattr(host, "num_classes", 0)), DENSE in models
    prefix = int(getattr(host, "num_prefix_tokens", 0))
    sums = {name: Logits() if classifier else Features(prefix) for name in models if name != DENSE}
    summed = Pass(sums, dict.fromkeys(models, 0.0))
    for x, y in batches:
        if not len(x):
            continue
        x = x.to(compute.torch_device, compute.torch_dtype)
        # two models take turns at being first, for their times; of more, outputs of one sparse model at a time are kept
        turned = len(models) == 2 and summed.images // len(x) % 2
        outputs: dict[str, Any] = {}
        for name in reversed([*models]) if turned else models:
            outputs[name], seconds = _timed(models[name], x, classifier)
            summed.seconds[name] += seconds
            if DENSE in outputs or not compared:
                for sparse in outputs.keys() - {DENSE}:
                    cast(Any, summed.sums[sparse]).add(outputs.get(DENSE), outputs.pop(sparse), y)
        summed.images += len(x)
        progress(summed.images)
    return summed


def figures_of(
    passes: Sequence[Pass], name: str = SPARSE, progress: neighbours.Progress = neighbours.nothing
) -> Evaluation:
    """The figures of a sparse model over the images of all passes, without throughput.

    progress: of the search for nearest neighbours, which models without a classifier need.
    """
    images = sum(each.images for each in passes)
    if not images:
        return Evaluation()
    sums = cast(Any, passes[0].sums[name])
    for other in passes[1:]:
        sums.merge(other.sums[name])
    figures = sums.result(images, progress) if isinstance(sums, Features) else sums.result(images)
    return replace(figures, images=images, broken=sum(each.flaws.broken for each in passes))


def rates_of(passes: Sequence[Pass]) -> dict[str, float]:
    """Images per second of a sparse model and of its dense original, the sums of all passes."""
    models = {f"throughput_{name}": name for name in passes[0].seconds}
    return {key: sum(p.images / p.seconds[name] for p in passes if p.images) for key, name in models.items()}


def _timed(model: nn.Module, x: Tensor, classifier: bool) -> tuple[Any, float]:
    """Logits, or without a classifier pooled features and tokens; and the seconds of the forward pass."""
    host = cast(Any, model)
    start = time.perf_counter()
    outputs = host(x) if classifier else host.forward_features(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    seconds = time.perf_counter() - start
    return outputs if classifier else (host.forward_head(outputs, pre_logits=True), outputs), seconds
