"""What a run will do, settled before anything is computed, so that a mistake in a recipe or its data costs no time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field as data_field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify.config import SparsityConfig, listed
from sparsify.errors import UsageError, field
from sparsify.fit.calibrate.repair import unrepairable
from sparsify.fit.finetune import trainable
from sparsify.fit.finetune.batches import Batches, BatchSettings
from sparsify.images import datasets
from sparsify.images.loaders import Decoded, ImageBatches, Items, LabelledBatches, LooseBatches, Part, Stream, share
from sparsify.images.preprocessing import class_names
from sparsify.images.trainset import TrainSet, WithCrops, trainset
from sparsify.processes import Compute, Listener
from sparsify.recipe import Recipe, Repair, Stage
from sparsify.reports.words import publishable

BATCH = 32  # images per forward pass of validation and least squares
FEW = 50  # validation images, below which the choice of the weights is mostly chance
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # a recipe's name -> accelerate's


@dataclass(frozen=True)
class TrainingData:
    """Images to train and validate on."""

    images: str  # training images (`sparsify.images.trainset`)
    val: str | None = None  # labelled (`sparsify.images.datasets.labelled`); None: a part of `images` is held back


@dataclass(frozen=True)
class RunOptions:
    """What does not change the result of a run."""

    folder: Path  # see `run_folder`
    device: str = "cpu"
    save_minutes: float = 5.0  # time between two saved states
    listener: Listener = data_field(default_factory=Listener)


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its batches."""

    stage: Stage
    batches: Batches
    steps: int  # optimiser steps
    images: int  # training images; 0 for a stream
    validate_every: int  # epochs between two validations; 0: at the end alone


@dataclass(frozen=True)
class Plan:
    """A run."""

    stages: tuple[PlannedStage, ...]
    images: TrainSet  # what everything is fitted to, calibration included
    validation: LabelledBatches  # this process's part
    validated_on: str  # describes the validation images
    note: str  # which of the named images they are, or ''
    warning: str  # of them, or ''
    precision: str  # a key of `PRECISIONS`
    seed: int
    # settings of the least squares before the stages, and their images, float32 [B, C, H, W], read anew by each iteration
    repair: tuple[Repair, Iterable[Tensor]] | None
    unrepaired: str  # why the recipe's least squares are left out, or ''
    unfolds: bool  # predictors that may be folded into qkv are trained
    folds_again: bool  # and folded afterwards, where that is exact
    identity: dict[str, Any]  # recipe, data and model, JSON-able; a run is resumed only by one of the same identity


def make_plan(model: nn.Module, recipe: Recipe, data: TrainingData, compute: Compute, dense_sha256: str) -> Plan:
    """The run of `recipe` on `data` for the dense `model`; of `compute` device, micro_batch and workers count.

    Raises `UsageError` where stages do not fit the model, its sparsity or the processes, and `BadData` where there are no
    images, too few, or other classes than the model's.
    """
    classes = int(cast(Any, model).num_classes)
    for stage in recipe.stages:
        check_stage(stage, recipe.sparsity, classes)
    hold_back = 0.0 if data.val is not None else recipe.hold_back
    if data.val is None and hold_back == 0:
        raise UsageError(f"hold_back 0 leaves no validation images: give {field('val')} PATH with labelled images")
    unrepaired = unrepairable(model) if recipe.repair else ""
    if unrepaired and not recipe.stages:
        raise UsageError(f"repair: {unrepaired}, and the recipe has no stages, so nothing would be trained")
    precision = resolve_precision(recipe.precision, compute.device)
    labels = any(stage.losses.classification > 0 for stage in recipe.stages)
    images = trainset(data.images, classes, labels, recipe.seed, hold_back, names=class_names(model))
    preprocessing = datasets.data_config(model)
    validation, validated_on, note, warning = _validation_images(images, data, model, compute.workers)
    stages = []
    for number, stage in enumerate(recipe.stages):
        if stage.cache_teacher and images.stream:
            raise UsageError(f"stage '{stage.name}': cache_teacher needs images by number, not a stream")
        settings = BatchSettings(
            stage.augmentation,
            preprocessing,
            seed=recipe.seed,
            stage=number,
            batch_size=stage.batch_size,
            micro_batch=compute.micro_batch,
            num_classes=classes if stage.losses.classification else None,
            workers=compute.workers,
        )
        batches = Batches(images.learn, settings, data.images)
        trainable.make_optimiser(model, stage)  # refused now, not after the calibration
        steps = trainable.steps_of(stage, batches.steps_per_epoch)
        count = 0 if images.stream else len(cast(Items, images.learn))
        stages.append(PlannedStage(stage, batches, steps, count, stage.validate_every or int(data.val is not None)))
    identity = {"recipe": recipe.model_dump(mode="json"), "data": images.digest, "dense": dense_sha256}
    identity |= {"val": data.val or "", "precision": precision}
    head_lowrank = recipe.sparsity.predictor == "head-lowrank"
    unfolds = head_lowrank and any(stage.moves_predictors and stage.losses.pairs for stage in recipe.stages)
    return Plan(
        stages=tuple(stages),
        images=images,
        validation=validation,
        validated_on=validated_on,
        note=note,
        warning=warning,
        precision=precision,
        seed=recipe.seed,
        repair=None if unrepaired else _repair_images(recipe, images, data, preprocessing, compute.workers),
        unrepaired=unrepaired,
        unfolds=unfolds,
        folds_again=unfolds and recipe.sparsity.fold,
        identity=identity,
    )


def resolve_precision(requested: str, device: str) -> str:
    """A key of `PRECISIONS`; `auto` is bfloat16 where the machine has instructions for it, else float32.

    Raises `UsageError` for float16 on a CPU, which has no such arithmetic.
    """
    on_cpu = torch.device(device).type == "cpu"
    if requested == "float16" and on_cpu:
        raise UsageError("precision float16 needs a GPU: give float32, bfloat16 or auto")
    if requested != "auto":
        return requested
    fast = torch.cpu._is_avx512_bf16_supported() if on_cpu else torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def check_stage(stage: Stage, sparsity: SparsityConfig, classes: int) -> None:
    """Raise `UsageError` where a stage does not fit what is trained; `classes`: outputs of the model, 0 for features."""
    name, losses, predictor = f"stage '{stage.name}'", stage.losses, sparsity.predictor
    if losses.classification > 0 and classes < 2:
        raise UsageError(f"{name}: the loss classification needs a model with classes; use tokens, features or logits")
    if stage.train == "predictors" and set(listed(sparsity.keep)) == {"dense"}:
        raise UsageError(f"{name} trains nothing: with keep dense there are no predictors")
    if sparsity.tokens is not None and stage.attention == "sparse" and losses.pairs:
        reason = "the losses attention and mass compare all tokens, and this model removes some"
        raise UsageError(f"{name}: {reason}: set attention: dense")
    if stage.attention == "dense" and stage.keep is not None:
        raise UsageError(f"{name}: keep has no effect with attention: dense")
    if losses.basis_l1 > 0 and (predictor != "token-lowrank" or sparsity.token_lowrank.shared_projection):
        raise UsageError(f"{name}: the loss basis_l1 is of W_up, which predictor {predictor} does not have here")
    if stage.train == "predictors" and predictor == "head-lowrank" and not losses.pairs:
        reason = "head-lowrank predictors learn from the losses attention and mass only"
        raise UsageError(f"{name} trains nothing: {reason}")


def _repair_images(
    recipe: Recipe, images: TrainSet, data: TrainingData, preprocessing: dict[str, Any], workers: int
) -> tuple[Repair, Iterable[Tensor]] | None:
    if recipe.repair is None:
        return None
    n, learn = recipe.repair.images, cast(Any, images.learn)
    if images.stream:
        dataset: Any = Stream(learn, datasets.transform(preprocessing), n)
    else:
        dataset = WithCrops(Part(learn, datasets.draw(len(learn), n, recipe.seed)), n, preprocessing, recipe.seed)
    return recipe.repair, ImageBatches(dataset, BATCH, workers, name=data.images)


def _validation_images(
    images: TrainSet, data: TrainingData, model: nn.Module, workers: int
) -> tuple[LabelledBatches, str, str, str]:
    """This process's part of the validation images, a description of all of them, a note and a warning or ''."""
    transform = datasets.transform(datasets.data_config(model))
    if data.val is not None:
        classes = int(cast(Any, model).num_classes)
        every = datasets.labelled(data.val, classes, transform, BATCH, workers, names=class_names(model))
        seen = images.fitted(getattr(every.dataset, "items", None))
        warning = (
            f"warning: {seen} of the validation images are also trained on: give {field('val')} others" if seen else ""
        )
        described = f"the labelled images of {publishable(data.val)}"
        note = f"{field('val')}: {every.note}" if every.note else ""
        return share(every), described, note, warning or _few(every.total, data.val)
    if images.stream:
        dataset: Any = Stream(cast(Any, images.held), transform)
        described = f"the first images of {publishable(data.images)}, held out of training"
    else:
        dataset = Decoded(cast(Items, images.held), transform)
        described = f"{len(dataset)} held-out images of {publishable(data.images)}"
    held = LooseBatches(dataset, BATCH, workers, name=data.images)
    return share(held), described, "", _few(held.total, None)


def _few(images: int | None, val: str | None) -> str:
    """A warning of few validation images; '' where there are enough, or nobody knows."""
    if images is None or images >= FEW:
        return ""
    more = f"give {field('val')} more images" if val else f"raise hold_back, or give {field('val')}"
    return f"warning: {images} validation images, but at least about {FEW} are expected: the choice is mostly chance; {more}"
