"""How a sparse model is made: `Recipe`, read from YAML by the name of a built-in recipe or from a file.

A recipe is the configuration of the model, its calibration, and the stages of its fine-tuning. Any field can be set by its
path (`Recipe.set`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sparsify.config import (
    Count,
    Frozen,
    NonNegative,
    Number,
    PositiveShare,
    Share,
    SparsityConfig,
    Whole,
    unknown,
    validate,
)
from sparsify.errors import UsageError, brief, field, one_line, short
from sparsify.files.plain_yaml import LONGEST, read_yaml, to_yaml

Positive = Annotated[Number, Field(gt=0)]


class Losses(Frozen):
    """Weights of the losses (0: off) and how they are computed. p_t, p_s: class probabilities of teacher and student."""

    classification: NonNegative = 0.0
    """cross-entropy with the labels (soft under mixup); needs labels"""
    logits: NonNegative = 0.0
    """T^2 KL(p_t || p_s) at temperature T, nats, mean over images; of one output, or where all classes are as likely:
    squared difference over the mean of the teacher's squares"""
    temperature: Positive = 1.0
    """T of `logits`"""
    tokens: NonNegative = 0.0
    """mean squared error of the remaining patch tokens after the final norm"""
    features: NonNegative = 0.0
    """squared error after each block relative to the teacher's squares, mean over blocks"""
    attention: NonNegative = 0.0
    """predicted against true attention, in the form of `attention_form`"""
    attention_form: Literal["mse-sum", "kl"] = "mse-sum"
    """mse-sum: squares summed over images, heads, rows and keys (the paper); kl: nats, mean over rows"""
    attention_blocks: Literal["mean", "rms"] = "mean"
    """how the `attention` of an image's blocks becomes one number; rms (root mean square): the blocks with the
    largest error count most"""
    mass: NonNegative = 0.0
    """fraction of the true attention on keys that the predictor drops, mean over rows and blocks"""
    attention_target: Literal["teacher", "self"] = "teacher"
    """whose dense attention is the true one: the teacher's, or the student's own (authors' option)"""
    coefficients: Literal["all", "kept"] = "all"
    """token-lowrank: those that `attention` and `mass` see; paper: all"""
    basis: Literal["raw", "used"] = "raw"
    """token-lowrank: W_up with signs (paper), or with sign and threshold as used"""
    basis_l1: NonNegative = 0.0
    """sum of |W_up| over all blocks (token-lowrank)"""
    reference_batch: Count = 168
    """images over which a summed loss is summed: B images count reference_batch / B"""

    @property
    def any(self) -> bool:
        """Whether any loss has a weight."""
        return self.backbone or self.predictors

    @property
    def backbone(self) -> bool:
        """Whether a loss reaches the backbone through the model's outputs."""
        return max(self.classification, self.logits, self.tokens, self.features) > 0

    @property
    def pairs(self) -> bool:
        """Whether a loss compares attentions, for which it needs queries and keys."""
        return max(self.attention, self.mass) > 0

    @property
    def predictors(self) -> bool:
        """Whether a loss reaches the predictors: the selection of keys itself has no gradient."""
        return self.pairs or self.basis_l1 > 0


class Optimiser(Frozen):
    """timm's optimiser of that name; as in timm, biases, norms and what the model names have no weight decay."""

    name: str = "adamw"
    """timm's name of it"""
    lr: Positive = 2e-4
    """largest learning rate, reached after the warm-up; not scaled with the batch"""
    weight_decay: NonNegative = 0.05
    """decay of the weights in each step, times lr"""
    betas: tuple[Share, Share] | None = None
    """null: the optimiser's own, (0.9, 0.999) of adamw"""
    eps: Positive | None = None
    """null: the optimiser's own"""
    momentum: Share = 0.9
    """of sgd and its relatives"""
    clip_grad: Positive | None = None
    """largest norm of the gradient"""
    layer_decay: PositiveShare | None = None
    """factor of the learning rate from each block to the one before it; null: 1"""


class Schedule(Frozen):
    """Learning rate by step: from `warmup_lr` up to the optimiser's lr, then down to `min_lr`."""

    name: Literal["cosine", "constant"] = "cosine"
    """shape after the warm-up"""
    warmup: NonNegative = 0.0
    """epochs"""
    warmup_share: Share = 0.0
    """the same as a fraction of the stage's steps; the larger counts"""
    warmup_lr: NonNegative = 0.0
    """at the first step of the warm-up"""
    min_lr: NonNegative = 0.0
    """at the last step of cosine"""


class Augmentation(Frozen):
    """timm's training transform and mixup; with `form: eval` the model's own evaluation transform."""

    form: Literal["eval", "train"] = "train"
    """eval: of the fields below, only those of mixup and cutmix and `smoothing` count"""
    scale: tuple[Share, Share] = (0.08, 1.0)
    """fraction of the image's area that is cropped"""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """width over height of the crop"""
    hflip: Share = 0.5
    """probability of a horizontal flip"""
    color_jitter: NonNegative = 0.0
    """strength, as timm's; 0: none"""
    auto_augment: str | None = None
    """timm's string: rand-m9-mstd0.5-inc1, ..."""
    interpolation: str | None = None
    """null: the model's own"""
    erase: Share = 0.0
    """probability of random erasing (pixels)"""
    mixup: NonNegative = 0.0
    """alpha; 0: off"""
    cutmix: NonNegative = 0.0
    """alpha; 0: off"""
    mixup_prob: Share = 1.0
    """fraction of the batches that are mixed"""
    mixup_switch: Share = 0.5
    """probability of cutmix where both are on"""
    smoothing: Share = 0.0
    """label smoothing"""

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return max(self.mixup, self.cutmix) > 0


class Anneal(Frozen):
    """The fraction of keys kept falls linearly from `start` to the model's own over the first part of a stage."""

    start: PositiveShare = 1.0
    """fraction of keys kept at the first step"""
    until: PositiveShare = 0.5
    """fraction of the stage's steps"""


class Stage(Frozen):
    """A stage of fine-tuning; it has `epochs`, `steps` or both, and ends with the first that is reached."""

    name: str = "distill"
    """in messages and in the run's files"""
    train: Literal["predictors", "attention", "backbone", "all"] = "backbone"
    """what learns; attention: only the attention modules of the backbone, so that MLPs, norms and head, which a few
    hundred images cannot teach anew, stay as pretrained"""
    attention: Literal["sparse", "dense"] = "sparse"
    """of the student's forward pass; dense: no sparsity, all tokens"""
    epochs: Positive | None = None
    """passes over the training images"""
    steps: Count | None = None
    """optimiser steps"""
    batch_size: Count = 16
    """images of a step, over all processes and micro-batches"""
    losses: Losses = Losses()
    """what is minimised"""
    optimiser: Optimiser = Optimiser()
    """of the stage"""
    schedule: Schedule = Schedule()
    """of the learning rate"""
    augmentation: Augmentation = Augmentation()
    """of the training images"""
    keep: Anneal | PositiveShare | None = None
    """fraction of keys kept in training; null: the model's own"""
    drop_path: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """stochastic depth of the last block"""
    ema: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """decay of the weights' running mean"""
    cache_teacher: bool = False
    """keep the teacher's outputs on disk; needs augmentation.form eval"""
    grad_checkpointing: bool = False
    """recompute each block in the backward: less memory, 1.3x time"""
    validate_every: Count | None = 1
    """epochs between validations; null: 1 where labelled images are given (`val`), else only at the end"""

    @property
    def moves_backbone(self) -> bool:
        """Whether weights of the dense model learn, all of them or some."""
        return self.train != "predictors"

    @property
    def moves_predictors(self) -> bool:
        """Whether predictors may learn: they do where a loss reaches them."""
        return self.train in ("predictors", "all")

    @model_validator(mode="after")
    def _fits_together(self) -> Stage:
        losses, mixes = self.losses, self.augmentation.mixes
        name = f"stage '{self.name}'"
        nothing, cache = f"{name} trains nothing", f"{name}: cache_teacher"
        if self.epochs is None and self.steps is None:
            raise ValueError(f"{name} has neither epochs nor steps")
        if not losses.any:
            raise ValueError(f"{nothing}: every loss has weight 0")
        if self.train == "predictors" and not losses.predictors:
            raise ValueError(f"{nothing}: predictors learn from the losses attention, mass and basis_l1 only")
        if not self.moves_predictors and not losses.backbone:
            raise ValueError(f"{nothing}: the backbone learns from classification, logits, tokens or features")
        if self.cache_teacher and (self.augmentation.form != "eval" or mixes):
            raise ValueError(f"{cache} needs augmentation.form eval, without mixup and cutmix")
        if self.cache_teacher and losses.pairs and losses.attention_target == "teacher":
            raise ValueError(f"{cache} holds no attention: the losses attention and mass need the teacher")
        if self.cache_teacher and losses.features > 0:
            raise ValueError(f"{cache} holds logits and patch tokens, not the loss features'")
        if mixes and self.batch_size % 2:
            raise ValueError(f"{name}: mixup and cutmix need an even batch_size, not {self.batch_size}")
        return self


class Repair(Frozen):
    """Least squares before the first stage: the last linear map of each attention and MLP is fitted to the dense model."""

    images: Count = 512
    """to fit to; random crops make up the number where the data has fewer"""
    layers: tuple[Literal["attention", "mlp"], ...] = ("attention",)
    """whose last linear map is fitted"""
    ridge: Positive = 0.3
    """lambda as a fraction of the mean square of the map's inputs"""
    prefix_weight: Positive = 3.0
    """of the row of a prefix token, which the classifier reads; a patch: 1"""


class Recipe(Frozen):
    """How to make a sparse model: its configuration, its calibration, and the stages of its fine-tuning, if any."""

    description: str = ""
    """one line, shown by `sparsify recipes` and in reports"""
    sparsity: SparsityConfig = SparsityConfig()
    """what the model becomes"""
    calib_images: Count = 128
    """to calibrate on; of images of more than 577 tokens fewer, with as many tokens"""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """of the draw of images and of the training"""
    start: Literal["closed-form", "random"] = "closed-form"
    """predictors before the first stage; random: as the authors"""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of the passes of the fine-tuning; auto: bfloat16 where the machine has instructions for it"""
    hold_back: Annotated[Number, Field(ge=0, lt=1)] = 0.125
    """fraction of the images (at most 1024) neither calibrated nor trained on, which decide the weights that are kept"""
    repair: Repair | None = None
    """before the stages; changes the backbone; null: none"""
    stages: tuple[Stage, ...] = ()
    """of the fine-tuning, in order; empty: calibration only"""

    @property
    def trains(self) -> bool:
        """Whether images change more than the predictors' closed-form fit."""
        return bool(self.stages) or self.repair is not None

    def without_training(self) -> Recipe:
        """A copy that only calibrates."""
        return self.model_copy(update={"stages": (), "repair": None})

    def override(self, **changes: Any) -> Recipe:
        """A copy with `changes`; `None` values are ignored; keys of `SparsityConfig` reach into `sparsity`.

        `UsageError` names an unknown argument, or a value that is out of range.
        """
        tree, outer, inner = self.model_dump(), Recipe.model_fields, SparsityConfig.model_fields
        for key, value in changes.items():
            if key not in outer and key not in inner:
                raise UsageError(unknown(key, [*inner, *outer], "argument"))
            if value is not None:
                (tree if key in outer else tree["sparsity"])[key] = value
        return validate(Recipe, tree, _argument)

    def set(self, assignments: Sequence[str]) -> Recipe:
        """A copy with fields set by their paths: `stages.0.epochs=3`, `sparsity.tail=none`; values are YAML.

        Raises:
            UsageError: no such field, or a value that does not fit it.
        """
        option, tree = field("set"), self.model_dump(mode="json")
        for assignment in assignments:
            path, equals, value = assignment.partition("=")
            if not equals or not path:
                example = f"FIELD=VALUE is expected, as in {option} stages.0.epochs=3"
                raise UsageError(f"{option} {short(assignment, 80)}: {example}")
            try:
                _set(tree, path.split("."), read_yaml(value))
            except LookupError as error:
                raise UsageError(f"{option} {short(path, 80)}: {error.args[0]}") from None
            except ValueError as error:
                raise UsageError(f"{option} {short(path, 80)}: {brief(value)} is not a YAML value: {error}") from None
        return validate(Recipe, tree, option)


def _argument(path: str) -> str:
    """A field of a recipe as who calls `override` named it: `rank.3` of `sparsity.rank.3`."""
    name, dot, rest = path.removeprefix("sparsity.").partition(".")
    return f"{name if name == 'tokens' else field(name)}{dot}{rest}"


def _set(tree: Any, path: list[str], value: Any) -> None:
    """Set the field of nested dicts and lists that have it already; `LookupError` says what is there instead."""
    name, *rest = path
    if not isinstance(tree, dict | list):
        raise LookupError(f"no field {brief(name)}, as what stands there is {brief(tree)}")
    names = {key: key for key in tree} if isinstance(tree, dict) else {str(i): i for i in range(len(tree))}
    if name not in names and isinstance(tree, list):
        raise LookupError(f"no item {brief(name)} in the list, which has {len(tree)}, counted from 0")
    if name not in names:
        raise LookupError(unknown(name, names))
    if rest:
        _set(tree[names[name]], rest, value)
    else:
        tree[names[name]] = value


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as the YAML that `load_recipe` reads."""
    return to_yaml(recipe.model_dump(mode="json"))


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipes().iterdir() if p.name.endswith(".yaml"))


def default_recipe(learns: bool) -> str:
    """The recipe where none is named: with training images, or without."""
    return "distill" if learns else "calibrate"


def recipe_text(name_or_file: str) -> str:
    """The YAML of the built-in recipe of that name, or of a file; `UsageError` where there is neither."""
    if name_or_file in recipe_names():
        return str((_recipes() / f"{name_or_file}.yaml").read_text(encoding="utf-8"))
    if os.path.isfile(name_or_file):
        with open(name_or_file, encoding="utf-8", errors="replace") as file:
            return file.read(LONGEST + 1)
    raise UsageError(f"no recipe {brief(str(name_or_file))}: give a YAML file or one of {', '.join(recipe_names())}")


def load_recipe(name_or_file: str) -> Recipe:
    """The built-in recipe of that name, or the one in a YAML file.

    Raises:
        UsageError: no such recipe, not YAML, an unknown key or a value out of range.
    """
    try:
        tree = read_yaml(recipe_text(name_or_file))
    except ValueError as error:
        raise UsageError(f"recipe {name_or_file} cannot be read as YAML: {error}") from None
    except OSError as error:
        raise UsageError(f"recipe {name_or_file} cannot be read: {one_line(error)}") from None
    return validate(Recipe, {} if tree is None else tree, f"recipe {name_or_file}:")


def _recipes() -> Any:
    """The folder of recipes: inside the installed package, or beside it in a checkout."""
    inside = resources.files("sparsify") / "recipes"
    return inside if inside.is_dir() else Path(__file__).resolve().parent.parent / "recipes"
