"""Accuracy of sparse models and of their dense original, and how far they agree, in one pass over the images.

The sparse form is always computed: there is no dense fallback here. All percentages run from 0 to 100. Of several processes
(`sparsify.processes`) each computes its part of the images in `evaluate_images`, and all get the figures of the whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from torch import nn

from sparsify import processes
from sparsify.errors import UsageError, field
from sparsify.images import datasets, measured
from sparsify.images.loaders import Flaws, LabelledBatches, share
from sparsify.images.measured import EvaluationImages, Measured, offering_no_labels
from sparsify.images.preprocessing import class_names
from sparsify.measure.accuracy import Evaluation
from sparsify.measure.figures import count_parameters
from sparsify.measure.passes import DENSE, SPARSE, Batches, Pass, figures_of, rates_of, run_pass
from sparsify.nn import graft, hosts
from sparsify.nn.adaptive import counting, lead
from sparsify.nn.attention import Execution, attention_modules, check_sparse
from sparsify.nn.execution import check_execution, sparse_form
from sparsify.ops import backends
from sparsify.processes import Compute, Listener

ENOUGH = 20  # images to tell an accuracy from chance
EVAL_BATCH = 32  # images computed together


def evaluate_images(
    model: nn.Module,
    images: str | EvaluationImages,
    *,
    dense: nn.Module | None = None,
    backbone_changed: bool = False,
    name: str = "",
    strict: bool = False,
    compute: Compute = Compute(),
    listener: Listener = Listener(),
) -> Evaluation:
    """Evaluates a sparse model, which may be adaptive, and its dense original on images; without labels only how far they
    agree.

    Of several processes every one must call it; the images are shared out, and `cuda` is a GPU of its own for each.

    Args:
        model: sparse; it is moved to the device and dtype of `compute`, and `dense` with it.
        dense: the original. None: the model's own weights without sparsity, which are the original's if it was only
            calibrated; with `backbone_changed` no dense model, and no dense figures.
        name: of the model in the results.
        strict: an image that cannot be read is an error.
        compute: batch_size: 32 images if None; micro_batch has no effect.

    Raises:
        SparsifyError: not a sparse model.
        UsageError: an unknown dtype, backend or precision, a backend that cannot be used here, or a dense model that
            cannot be compared with this one; neither labels nor a dense model.
        BadData: no images; `BadLabels`: labels that are missing or do not fit the model's.
    """
    compute = replace(compute, device=processes.local_device(compute.device))
    device, dtype = compute.torch_device, compute.torch_dtype
    execution = Execution(compute.backend, compute.kernel_precision)
    check_sparse(model)
    host = lead(model)
    check_execution(execution, device, dtype, hosts.biased(host))  # before anything is read
    if dense is not None:
        graft.check_original(dense, host)

    def ready(loader: LabelledBatches) -> dict[str, nn.Module]:
        if note := backends.note(compute.backend, device, dtype, hosts.biased(host)):
            listener.say(note)
        sparse, beside = model.to(device, dtype).eval(), dense
        form.enter_context(sparse_form(sparse, compute.backend, compute.kernel_precision))
        if beside is None and not backbone_changed:
            beside = graft.dense_twin(host)
        return _named(sparse, None if beside is None else beside.to(device, dtype).eval())

    described = Described.of(host)
    with contextlib.ExitStack() as form, counting(model) as counted:
        result, parts = over(ready, described, images, strict, compute, listener, counted)
    return replace(
        result,
        model=name,
        ran_twice=100 * sum(each.twice for each in parts) / result.images if host is not model else None,
        param_count=count_parameters(model),
    )


class Described(NamedTuple):
    """What a model says of its images and its answers."""

    config: Mapping[str, Any]  # preprocessing, as `datasets.data_config`
    classes: int  # 0: features
    names: tuple[str, ...]  # of the classes, in their order; () where it does not know

    @classmethod
    def of(cls, model: nn.Module) -> Described:
        """Of a model."""
        return cls(datasets.data_config(model), int(getattr(model, "num_classes", 0)), class_names(model))


def over(
    ready: Callable[[LabelledBatches], Mapping[str, nn.Module]],
    described: Described,
    images: str | EvaluationImages,
    strict: bool,
    compute: Compute,
    listener: Listener,
    counted: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Evaluation, list[Pass]]:
    """One pass of some models over images, shared out among the processes: the figures, and the sums behind them.

    Args:
        ready: called once the images are found; the models as `run_pass` takes them.
        strict, compute, listener: see `evaluate_images`; counted: `twice` is of the images of this process.

    Raises:
        BadData: no images; `BadLabels`: labels that are missing or do not fit.
        UsageError: no labels, and no dense model.
    """
    processes.start(compute.device)
    config, classes = dict(described.config), described.classes
    images = EvaluationImages(images) if isinstance(images, str) else images
    with processes.agree():
        found = batches_of(described, images, compute, strict)
        loader = found.batches
        if loader.note:
            listener.say(loader.note)
        models = ready(loader)
        if not found.labelled and DENSE not in models:
            nothing = "the images have no labels and there is no dense model to compare with: nothing to measure"
            raise UsageError(f"{images.path}: {nothing}")
        local, total, every = share(loader), loader.total, processes.world()

        def progress(done: int) -> None:
            listener.progress("eval", done * every if total is None else min(done * every, total), total)

        with offering_no_labels(images):
            part = run_pass(models, local, compute, progress)
        part.flaws, part.twice = local.flaws, counted.get("twice", 0)
    parts = processes.gather(part)
    searched = partial(listener.progress, "neighbours")
    flaws, result = sum((each.flaws for each in parts), Flaws()), figures_of(parts, progress=searched)
    if not result.images:
        raise flaws.nothing_read(images.path)
    for line in flaws.lines():
        listener.say(line)
    if by_chance(result, classes):
        which = SPARSE if result.dense_top1 is None else DENSE
        ask = f"do the folders stand for the model's classes, in its order? see {field('class_map')}"
        listener.say(f"top-1 of the {which} model is no better than chance ({100 / classes:.2f} %): {ask}")
    taken = {
        "img_size": int(config["input_size"][-1]),
        "crop_pct": float(config["crop_pct"]),
        "interpolation": config["interpolation"],
        "drawn_from": found.drawn_from,
    }
    return replace(result, **taken, **cast(Any, rates_of(parts))), parts


def batches_of(described: Described, images: EvaluationImages, compute: Compute, strict: bool = False) -> Measured:
    """The images that a model is evaluated on, preprocessed as it says; see `measured.opened`."""
    return measured.opened(
        images,
        described.classes,
        datasets.transform(dict(described.config)),
        names=described.names,
        batch_size=compute.batch_size or EVAL_BATCH,
        workers=compute.workers,
        strict=strict,
    )


def by_chance(result: Evaluation, classes: int) -> bool:
    """Whether the original (without it the sparse model) is right about as often as guesses are: within two deviations."""
    top1 = result.top1 if result.dense_top1 is None else result.dense_top1
    if top1 is None or classes < 2 or result.images < ENOUGH:
        return False
    expected = result.images / classes
    return top1 / 100 * result.images <= expected + 2 * math.sqrt(expected * (1 - 1 / classes))


def evaluate(
    sparse: nn.Module, dense: nn.Module | None, batches: Batches, compute: Compute | None = None
) -> Evaluation:
    """Runs both models over `batches`, in this process alone. dense: None leaves every dense figure None.

    compute: the device and dtype that the models, in eval mode, are on already. None: `own_compute`.
    """
    compute = compute or own_compute(sparse)
    with sparse_form(sparse, compute.backend, compute.kernel_precision):
        passes = [run_pass(_named(sparse, dense), batches, compute)]
    result = figures_of(passes)
    return replace(result, **cast(Any, rates_of(passes))) if result.images else result


def own_compute(model: nn.Module) -> Compute:
    """On the CPU in float32, with the backend and the kernel precision that `model` has."""
    execution = next((module.execution for module in attention_modules(model).values()), Execution())
    return Compute(backend=execution.backend, kernel_precision=execution.precision)


def _named(sparse: nn.Module, dense: nn.Module | None) -> dict[str, nn.Module]:
    return {SPARSE: sparse} if dense is None else {DENSE: dense, SPARSE: sparse}
