"""What `convert` and `sweep` share: a dense model, checked against its configuration, and its closed-form calibration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.config import SparsityConfig, Target, Tokens
from sparsify.errors import BadFile, SparsifyError, field
from sparsify.fit.calibrate.budgets import spends
from sparsify.fit.calibrate.calibrate import Calibration, calibrate, first_images, fit_importance, images_of
from sparsify.fit.schedule import sureness
from sparsify.fit.schedule.choose import sensitivity
from sparsify.fit.schedule.head_costs import timed
from sparsify.fit.schedule.sensitivity import Sensitivity
from sparsify.images import datasets, given
from sparsify.images.given import GivenImages
from sparsify.images.loaders import ImageBatches
from sparsify.images.preprocessing import Preprocessing
from sparsify.images.trainset import TrainSet, builtin_calibration
from sparsify.models import building, module, names, pretrained
from sparsify.models.digits import network
from sparsify.nn import graft, hosts
from sparsify.nn.adaptive import Sureness
from sparsify.nn.attention import Execution
from sparsify.nn.execution import check_execution, set_execution
from sparsify.ops import backends
from sparsify.processes import Compute, Listener
from sparsify.recipe import Recipe

BATCH_SIZE = 16  # images; bounds the memory of the widest step, the reference attention at four ranks
PROBE_IMAGES = 64  # calibration images on which a schedule is chosen
MARGINS = (
    4  # times as many of the user's images tell how sure a schedule is: of 128, the share run again varies by half
)


@dataclass(frozen=True)
class DenseRequest:
    """The dense model that a job starts from: a name, or a module that the caller holds (all else is None then)."""

    name: str = ""  # alias, timm name, ORG/NAME of the hub, a folder, or digits
    weights: Path | None = None  # local checkpoint (.safetensors, .pth, *.index.json) of it; None: the name's own
    num_classes: int | None = None  # outputs of the head, 0 for features; None: as many as the weights have
    img_size: int | None = None  # side in pixels; None: the size that the weights have
    ema: bool | None = (
        None  # of `weights`: the averaged ones, or the others; None: the averaged ones where there are any
    )
    preprocessing: Preprocessing | None = None  # what of it is given, names of classes among it; None: nothing
    allow_nonfinite: bool = False  # take weights with NaN or infinity
    module: nn.Module | None = None  # takes the place of name, weights, num_classes, img_size and ema


class Dense(NamedTuple):
    """A dense model with its weights, float32, eval mode, on the job's device; `source`: what its name stands for."""

    source: names.Source
    model: nn.Module
    averaged: bool | None = None  # see `sparsify.models.dense_weights.Checkpoint`


def load_dense(request: DenseRequest, config: SparsityConfig, compute: Compute, listener: Listener) -> Dense:
    """Loads the dense model once `config` fits it and the backend can run it; refuses before anything is downloaded.

    Raises:
        UsageError: an unknown name, a configuration that does not fit, or a backend that cannot be used here.
        UnsupportedModel: attention that is not understood.
        SparsifyError: see `sparsify.models.pretrained.load`.
    """
    if request.module is not None:
        return _copied(request.module, request, config, compute)
    execution, device, dtype = Execution(compute.backend), compute.torch_device, compute.torch_dtype
    check_execution(execution, device, dtype)
    source = names.resolve(request.name)
    if source.note:
        listener.say(source.note)
    skeleton = building.skeleton(source, request.num_classes, request.img_size)
    hosts.supported_attentions(skeleton, source.asked)
    graft.plans_of(skeleton, config)
    check_execution(execution, device, dtype, hosts.biased(skeleton))
    source, checkpoint = pretrained.given_weights(source, request.weights, request.ema)
    if checkpoint is not None and checkpoint.note:
        listener.say(checkpoint.note)
    model = pretrained.load(source, checkpoint, request.num_classes, request.img_size).to(device)
    if request.preprocessing is not None:
        request.preprocessing.apply(model)
    if not request.allow_nonfinite:
        _refuse_nonfinite(model, source.asked)
    if note := building.note(model, source):
        listener.say(note)
    return Dense(source, model, None if checkpoint is None else checkpoint.averaged)


def _copied(held: nn.Module, request: DenseRequest, config: SparsityConfig, compute: Compute) -> Dense:
    """A copy of the caller's module; errors as of `load_dense`, and of `sparsify.models.module.copied`."""
    execution, device, dtype = Execution(compute.backend), compute.torch_device, compute.torch_dtype
    source, model = module.copied(held)
    check_execution(execution, device, dtype, hosts.biased(model))
    graft.plans_of(model, config)
    model = model.to(device)
    if request.preprocessing is not None:
        request.preprocessing.apply(model)
    if not request.allow_nonfinite:
        _refuse_nonfinite(model, f"this {type(held).__name__}")
    return Dense(source, model)


@contextlib.contextmanager
def _finite_moments() -> Iterator[None]:
    """Closed forms have no solution for NaN: then one line says so."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        expected = "finite weights and images, and a dtype in which they do not overflow, are expected"
        raise SparsifyError(
            f"queries or keys of this model are not finite, so calibration is impossible: {expected}"
        ) from error


def _refuse_nonfinite(model: nn.Module, name: str) -> None:
    bad = {key: int((~t.isfinite()).sum()) for key, t in model.state_dict().items() if t.is_floating_point()}
    bad = {key: n for key, n in bad.items() if n}
    if bad:
        words = ", ".join(f"{key} ({n:,})" for key, n in [*bad.items()][:3]) + (", ..." if len(bad) > 3 else "")
        asked = f"{field('allow_nonfinite')} converts them all the same"
        raise BadFile(f"weights of {name} are NaN or infinite in {len(bad)} tensors: {words}; {asked}")


@dataclass(frozen=True)
class Calibrator:
    """The closed-form calibration of dense models on one set of images."""

    draw: Callable[
        [int], Iterator[Tensor]
    ]  # up to so many, the same at each call: [B, C, H, W] on the device, normalised
    words: str  # what they are, for messages
    total: int  # how many of them calibrate, at most
    margins: int  # how many tell how sure a schedule is, at most
    compute: Compute  # calibration is under autocast to its dtype
    listener: Listener

    @classmethod
    def on(
        cls,
        images: TrainSet | GivenImages | None,
        dense: Dense,
        recipe: Recipe,
        compute: Compute,
        listener: Listener,
        option: str = "data",
    ) -> Calibrator:
        """On `recipe.calib_images` of the images to learn from (None: the built-in set), drawn by the recipe's seed.

        `option`: the argument that `images` was given by, for the description.
        """
        transform = datasets.transform(datasets.data_config(dense.model))
        n = images_of(recipe.calib_images, hosts.num_tokens(dense.model))
        size, device = compute.batch_size or BATCH_SIZE, compute.torch_device
        if isinstance(images, GivenImages):
            return cls._on_given(images, n, dense.model, compute, listener)
        if images is not None:
            if images.note:
                listener.say(f"{field(option)}: {images.note}")
            make: Callable[..., ImageBatches] = images.calibration
            words = f"up to {n} images of {images.name} (labels are not used)"
        else:
            digits = dense.source.architecture == network.ARCHITECTURE
            make = partial(builtin_calibration, digits)
            source = "digits of the training split" if digits else "built-in pictures"
            words = f"{n} {source}, because {field(option)} was not given"
        told: list[str] = []

        @cache
        def loader(n: int) -> ImageBatches:
            return make(n, recipe.seed, transform, size, compute.workers)

        def draw(n: int) -> Iterator[Tensor]:
            yield from (x.to(device) for x in loader(n))
            for line in loader(n).flaws.lines() if not told else ():  # of the first whole pass; the others are alike
                told.append(line)
                listener.say(f"calibration images: {line}")

        return cls(draw, words, n, n if images is None else MARGINS * n, compute, listener)

    @classmethod
    def _on_given(
        cls, images: GivenImages, n: int, model: nn.Module, compute: Compute, listener: Listener
    ) -> Calibrator:
        """On the first `n` of the caller's tensors, as they are."""
        tensors = images.first(n, model, listener.progress)
        if line := given.note(tensors, model, images.option):
            listener.say(line)
        size, device, count = compute.batch_size or BATCH_SIZE, compute.torch_device, len(tensors)
        words = f"the first {count} images of {field(images.option)}, given as tensors"

        def draw(n: int) -> Iterator[Tensor]:
            return (x.to(device) for x in tensors[:n].split(size))

        return cls(draw, words, count, count, compute, listener)

    def batches(self) -> Iterator[Tensor]:
        """The images to calibrate on, anew at each call."""
        return self.draw(self.total)

    def calibrate(self, model: nn.Module, config: SparsityConfig, keeps: Sequence[float | None] = ()) -> Calibration:
        """Grafts sparse attention into a dense `model`, in place, and fits its predictors; `keeps`: see `calibrate`."""
        device, dtype = self.compute.torch_device, self.compute.torch_dtype
        self.listener.say(f"calibrating on {self.words}")
        note = backends.note(self.compute.backend, device, dtype, hosts.biased(model))
        if note and spends(config):
            self.listener.say(note)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), _finite_moments():
            others = [keep for keep in keeps if keep]
            execution = Execution(self.compute.backend)
            return calibrate(model, config, self.batches, self._progress, execution, others)

    def sensitivity(
        self,
        calibration: Calibration,
        tokens: Tokens | None,
        target: Target = Target(of="macs", shares=(1.0,)),
        step: str = "sensitivity",
    ) -> Sensitivity:
        """What tokens and keys removed in each block cost a calibrated model; it gets its fitted importance.

        `tokens`: as the search takes them; `target`: what it is for, with the keeps to try; `step`: its name.
        """
        model, config = calibration.model, calibration.config.model_copy(update={"tokens": tokens})
        if (config.tokens or Tokens()).importance == "fitted":
            fit_importance(model, self.batches, self._progress)
        set_execution(model, Execution(self.compute.backend))
        probe = list(first_images(self.batches(), PROBE_IMAGES))
        total = sum(map(len, probe))
        budgets = calibration.budgets
        if target.of == "latency":
            budgets = timed(model, budgets, target.batch_size)
        options = budgets.options(target.keeps)
        found = sensitivity(model, config, probe, options, lambda done: self.listener.progress(step, done, total))
        return found if target.of == "latency" else replace(found, budgets=budgets)

    def sureness(self, model: nn.Module, schedules: Mapping[float, SparsityConfig]) -> dict[float, Sureness]:
        """How sure a calibrated model is of the images by each of its schedules; nothing of one without a classifier."""
        n = self.margins
        return sureness.measure(model, schedules, self.draw(n), lambda done: self._progress("margins", done, n))

    def _progress(self, step: str, done: int, total: int | None) -> None:
        self.listener.progress(step, done, total or self.total)
