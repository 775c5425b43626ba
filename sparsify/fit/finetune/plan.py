"""What a run will do, settled before anything is computed: every mistake in a recipe or its data shows here, in one line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from sparsify import processes
from sparsify.config import SparsityConfig
from sparsify.errors import UsageError
from sparsify.files import publishable
from sparsify.fit.calibrate import repair
from sparsify.fit.finetune import devices, trainable
from sparsify.fit.finetune.batches import Batches
from sparsify.fit.finetune.validation import Labelled
from sparsify.images import datasets
from sparsify.images.crops import WithCrops
from sparsify.images.loaders import Decoded, ImageBatches, Items, Part, Stream
from sparsify.images.sharing import share
from sparsify.images.trainset import TrainSet, trainset
from sparsify.recipe import Recipe, Repair, Stage

JUDGE_BATCH = 32  # images that are judged together
REPAIR_BATCH = 32  # images whose least squares are summed together
Images = Iterable[Tensor]


@dataclass(frozen=True)
class Source:
    """Where the images come from and how they are computed.

    Attributes:
        images: what is learned from (`sparsify.images.trainset`).
        val: labelled images between the epochs (`sparsify.images.datasets.labelled`); None: a part of `images` is held back.
        device: cpu, cuda, ...; workers: processes that read images.
        micro_batch: most images computed together in one process.
    """

    images: str
    val: str | None = None
    device: str = "cpu"
    workers: int = 0
    micro_batch: int = 64


@dataclass(frozen=True)
class Planned:
    """A stage with its images: `steps` of its batches; `images` to learn from (0: a stream's).

    `validate_every`: epochs between two validations; 0: at the end alone.
    """

    stage: Stage
    batches: Batches
    steps: int
    images: int
    validate_every: int


@dataclass(frozen=True)
class Plan:
    """A run: its stages, what judges it, and what it must be the same in to be resumed.

    Attributes:
        judged: gives the images of the judge.
        judged_on: them in words; note: what was left out, or ''.
        repair: settings of the least squares before the stages, and its images, float32 [B, C, H, W], read anew at each
            call; None: none.
        unfolds: predictors learn that may be folded into qkv; folds_again: they are to be, where it is exact.
        identity: recipe, data and model, JSON-able.
    """

    stages: tuple[Planned, ...]
    judged: Labelled
    judged_on: str
    note: str
    precision: str
    seed: int
    repair: tuple[Repair, Images] | None
    unfolds: bool
    folds_again: bool
    identity: dict[str, Any]

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(planned.steps for planned in self.stages)


def plan(model: nn.Module, recipe: Recipe, source: Source, dense_sha256: str) -> Plan:
    """The run of `recipe` on the images of `source` for the dense `model`.

    Raises:
        UsageError: stages that do not fit the model, its sparsity or the processes.
        BadData: no images, too few, other classes than the model's.
    """
    classes = int(cast(Any, model).num_classes)
    for stage in recipe.stages:
        check(stage, recipe.sparsity, classes)
    labels = any(stage.losses.classification > 0 for stage in recipe.stages)
    hold_back = 0.0 if source.val is not None else recipe.hold_back
    if source.val is None and hold_back == 0:
        raise UsageError("hold_back 0 leaves nothing to judge by: give --val PATH with labelled images")
    kind = devices.precision(recipe.precision, source.device)
    images = trainset(source.images, classes, labels, recipe.seed, hold_back)
    config = datasets.data_config(model)
    judged, words = _judged(images, source, config, classes)
    stages = []
    for number, stage in enumerate(recipe.stages):
        batches = Batches(
            images.learn, stage.augmentation, config, recipe.seed, number, stage.batch_size, processes.world(),
            processes.rank(), source.micro_batch, source.workers, classes if stage.losses.classification else None,
            source.images,
        )  # fmt: skip
        if stage.cache_teacher and images.stream:
            raise UsageError(f"stage '{stage.name}': cache_teacher needs images by number, not a stream")
        trainable.optimiser(model, stage)  # refused now, not after the calibration
        steps = trainable.steps_of(stage, batches.steps_per_epoch)
        known = 0 if images.stream else len(cast(Items, images.learn))
        every = stage.validate_every or (0 if source.val is None else 1)
        stages.append(Planned(stage, batches, steps, known, every))
    identity = {
        "recipe": recipe.model_dump(mode="json"), "data": images.digest, "dense": dense_sha256, "val": source.val or "",
        "precision": kind,
    }  # fmt: skip
    learns = recipe.sparsity.predictor == "head-lowrank" and any(
        stage.moves_predictors and stage.losses.pairs for stage in recipe.stages
    )
    return Plan(
        stages=tuple(stages), judged=judged, judged_on=words, note=images.note, precision=kind, seed=recipe.seed,
        repair=_repaired(model, recipe, images, source, config), unfolds=learns,
        folds_again=learns and recipe.sparsity.fold, identity=identity,
    )  # fmt: skip


def check(stage: Stage, sparsity: SparsityConfig, classes: int) -> None:
    """Raise `UsageError` where a stage does not fit what is trained; `classes`: outputs of the model, 0 for features."""
    name, losses = f"stage '{stage.name}'", stage.losses
    if losses.classification > 0 and not classes:
        raise UsageError(f"{name}: the loss classification needs a model with classes; use tokens, features or logits")
    keeps = sparsity.keep if isinstance(sparsity.keep, tuple) else (sparsity.keep,)
    if stage.train == "predictors" and all(keep == "dense" for keep in keeps):
        raise UsageError(f"{name} trains nothing: with keep dense there are no predictors")
    if sparsity.tokens is not None and stage.attention == "sparse" and losses.pairs:
        raise UsageError(
            f"{name}: the losses attention and mass compare all tokens, and tokens leave this model: set attention: dense"
        )
    if stage.attention == "dense" and stage.keep is not None:
        raise UsageError(f"{name}: keep has no effect with attention: dense")
    if losses.basis_l1 > 0 and (sparsity.predictor != "token-lowrank" or sparsity.token_lowrank.shared_projection):
        raise UsageError(
            f"{name}: the loss basis_l1 is of W_up, which predictor {sparsity.predictor} does not have here"
        )
    if stage.train == "predictors" and sparsity.predictor == "head-lowrank" and not losses.pairs:
        raise UsageError(
            f"{name} trains nothing: head-lowrank predictors learn from the losses attention and mass only"
        )


def _repaired(
    model: nn.Module, recipe: Recipe, images: TrainSet, source: Source, config: dict[str, Any]
) -> tuple[Repair, Images] | None:
    if recipe.repair is None:
        return None
    repair.check(model)
    n = recipe.repair.images
    if images.stream:
        stream = Stream(cast(Any, images.learn), datasets.transform(config), n)
        return recipe.repair, ImageBatches(stream, REPAIR_BATCH, 0, place=source.images)
    learn = cast(Items, images.learn)
    some = WithCrops(Part(learn, datasets.draw(len(learn), n, recipe.seed)), n, config, recipe.seed)
    return recipe.repair, ImageBatches(some, REPAIR_BATCH, source.workers, place=source.images)


def _judged(images: TrainSet, source: Source, config: dict[str, Any], classes: int) -> tuple[Labelled, str]:
    transform = datasets.transform(config)
    if source.val is not None:
        found = share(datasets.labelled(source.val, classes, transform, JUDGE_BATCH, source.workers))
        return lambda: iter(found), f"the labelled images of {publishable(source.val)}"
    if images.stream:
        dataset: Any = Stream(cast(Any, images.held), transform)
        words = f"the first images of {publishable(source.images)}"
    else:
        held = cast(Items, images.held)
        dataset, words = (
            Decoded(held, transform),
            f"{len(held)} images of {publishable(source.images)} that nothing learns from",
        )
    workers = 0 if images.stream else source.workers
    return share(ImageBatches(dataset, JUDGE_BATCH, workers, place=source.images)).pairs, words
