"""Accuracy of sparse models and of their dense original, and how far they agree, in one pass over the images.

The sparse form is always computed: there is no dense fallback here. All percentages run from 0 to 100. Of several processes
(`sparsify.processes`) each computes its part of the images in `evaluate_images`, and all get the figures of the whole.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as data_field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from sparsify import processes
from sparsify.errors import SparsifyError, field
from sparsify.images import datasets
from sparsify.images.loaders import Decoded, Flaws, Items, LabelledBatches, LooseBatches, Part, Stream, share
from sparsify.images.preprocessing import class_names
from sparsify.measure.accuracy import Evaluation, Features, Logits
from sparsify.measure.figures import count_parameters
from sparsify.nn import graft, hosts
from sparsify.nn.adaptive import counting, lead
from sparsify.nn.attention import Execution, attention_modules, check_sparse
from sparsify.nn.execution import check_execution, sparse_form
from sparsify.ops import backends
from sparsify.processes import Compute, Listener

ENOUGH = 20  # images to tell an accuracy from chance
EVAL_BATCH = 32  # images computed together
DENSE, SPARSE = "dense", "sparse"  # names of models in a pass

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images [B, C, H, W] and labels int64 [B], -1 for none."""


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
    """Evaluates a sparse model, which may be adaptive, and its dense original on labelled images (`datasets.labelled`).

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
            cannot be compared with this one.
        BadData: no images, no labels, or classes that do not fit the model's.
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
    images: str,
    strict: bool,
    compute: Compute,
    listener: Listener,
    counted: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Evaluation, list[Pass]]:
    """One pass of some models over labelled images, shared out among the processes: the figures, and the sums behind them.

    Args:
        ready: called once the images are found; the models as `run_pass` takes them.
        strict, compute, listener: see `evaluate_images`; counted: `twice` is of the images of this process.

    Raises:
        BadData: no images, no labels, or classes that do not fit.
    """
    processes.start(compute.device)
    config, classes = dict(described.config), described.classes
    with processes.agree():
        size, to = compute.batch_size or EVAL_BATCH, datasets.transform(config)
        loader = datasets.labelled(images, classes, to, size, compute.workers, strict, names=described.names)
        if loader.note:
            listener.say(loader.note)
        models = ready(loader)
        local, total, every = share(loader), loader.total, processes.world()

        def progress(done: int) -> None:
            listener.progress("eval", done * every if total is None else min(done * every, total), total)

        part = run_pass(models, local, compute, progress)
        part.flaws, part.twice = local.flaws, counted.get("twice", 0)
    parts = processes.gather(part)
    flaws, result = sum((each.flaws for each in parts), Flaws()), figures_of(parts)
    if not result.images:
        raise flaws.nothing_read(images)
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
    }
    return replace(result, **taken, **cast(Any, rates_of(parts))), parts


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


def compare(
    dense: nn.Module,
    sparse: Mapping[str, nn.Module],
    batches: Batches,
    compute: Compute,
    progress: Callable[[int], None],
) -> dict[str, Evaluation]:
    """Every sparse model, as it executes now, beside the dense one, which computes once; throughput is not measured.

    Raises `SparsifyError` if there are no images.
    """
    summed = run_pass({DENSE: dense, **sparse}, batches, compute, progress)
    if not summed.images:
        raise SparsifyError("there are no images to evaluate on")
    return {name: figures_of([summed], name) for name in sparse}


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


def figures_of(passes: Sequence[Pass], name: str = SPARSE) -> Evaluation:
    """The figures of a sparse model over the images of all passes, without throughput."""
    images = sum(each.images for each in passes)
    if not images:
        return Evaluation()
    sums = cast(Any, passes[0].sums[name])
    for other in passes[1:]:
        sums.merge(other.sums[name])
    return replace(sums.result(images), images=images, broken=sum(each.flaws.broken for each in passes))


def rates_of(passes: Sequence[Pass]) -> dict[str, float]:
    """Images per second of a sparse model and of its dense original, the sums of all passes."""
    models = {f"throughput_{name}": name for name in passes[0].seconds}
    return {key: sum(p.images / p.seconds[name] for p in passes if p.images) for key, name in models.items()}


def _named(sparse: nn.Module, dense: nn.Module | None) -> dict[str, nn.Module]:
    return {SPARSE: sparse} if dense is None else {DENSE: dense, SPARSE: sparse}


def _timed(model: nn.Module, x: Tensor, classifier: bool) -> tuple[Any, float]:
    """Logits, or without a classifier pooled features and tokens; and the seconds of the forward pass."""
    host = cast(Any, model)
    start = time.perf_counter()
    outputs = host(x) if classifier else host.forward_features(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    seconds = time.perf_counter() - start
    return outputs if classifier else (host.forward_head(outputs, pre_logits=True), outputs), seconds


def images_of(
    model: nn.Module, images: str, must_be_labelled: bool, limit: int | None, seed: int, workers: int
) -> tuple[LabelledBatches, bool]:
    """The images to evaluate `model` on, `limit` of them drawn by `seed`, and whether they have labels."""
    transform, classes = datasets.transform(datasets.data_config(model)), int(getattr(model, "num_classes", 0))
    folder = Path(images)
    if not must_be_labelled and folder.is_dir() and not any(child.is_dir() for child in folder.iterdir()):
        items = cast(Items, datasets.all_images(images, "train")[0])  # files alone: nothing could name a class
        some = Part(items, datasets.draw(len(items), limit or len(items), seed), labels=False)
        return LooseBatches(Decoded(some, transform), EVAL_BATCH, workers, name=images), False
    every = datasets.labelled(images, classes, transform, EVAL_BATCH, workers, names=class_names(model))
    if limit is None or (every.total is not None and every.total <= limit):
        return every, True
    if isinstance(every.dataset, Stream):
        dataset: Any = Stream(every.dataset.source, transform, limit)
    else:  # drawn, in their order: the first images of a folder are those of its first classes
        drawn = sorted(random.Random(seed).sample(range(cast(int, every.total)), limit))
        dataset = Subset(every.dataset, drawn)
    return replace(every, dataset=dataset), True
