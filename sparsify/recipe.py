"""How to make a sparse model, as YAML: `Recipe`, found by name or file, any field overridden by its path."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from sparsify.config import Frozen, SparsityConfig, validate
from sparsify.errors import UsageError


class Repair(Frozen):
    """Least squares before the first stage: the last linear map of each attention and MLP is fitted to the dense model."""

    images: Annotated[int, Field(ge=1)] = Field(
        512, description="fitted to; where the data has fewer, random crops of them make up the number"
    )
    layers: tuple[Literal["attention", "mlp"], ...] = ("attention",)
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        0.3, description="lambda as a share of the mean square of the map's inputs"
    )
    prefix_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        3.0, description="of a prefix token's row, which the classifier reads; a patch token's is 1"
    )


class Recipe(Frozen):
    """How to make a sparse model: what it is, its calibration, and the stages of its fine-tuning (none: calibrated only)."""

    description: str = ""
    sparsity: SparsityConfig = SparsityConfig()
    calib_images: Annotated[int, Field(ge=1)] = 128
    seed: Annotated[int, Field(ge=0)] = 0
    start: Literal["closed-form", "random"] = Field(
        "closed-form", description="predictors before the first stage: calibrated, or as the authors draw them"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the passes of the fine-tuning; auto: bfloat16 where the machine has instructions for it"
    )
    hold_back: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.125, description="share of the images (at most 1024) that is not learned from and decides what is kept"
    )
    repair: Repair | None = Field(None, description="before the stages; changes the backbone; null: none")
    stages: tuple[Stage, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether images change more than the predictors' closed-form fit."""
        return bool(self.stages) or self.repair is not None

    def without_training(self) -> Recipe:
        """The same, calibrated only."""
        return self.model_copy(update={"stages": (), "repair": None})

    def override(self, **changes: Any) -> Recipe:
        """A copy with `changes`; `None` values are left out; keys of `SparsityConfig` reach into `sparsity`.

        Raises:
            UsageError: a value that is out of range, with its name.
        """
        tree = self.model_dump()
        for key, value in changes.items():
            if value is not None:
                (tree if key in type(self).model_fields else tree["sparsity"])[key] = value
        return validate(Recipe, tree, "option")

    def set(self, assignments: Sequence[str]) -> Recipe:
        """A copy with fields named by their paths: `stages.0.epochs=3`, `sparsity.tail=none`; values are YAML.

        Raises:
            UsageError: no such field, or a value that does not fit it.
        """
        tree = self.model_dump(mode="json")
        for assignment in assignments:
            path, equals, value = assignment.partition("=")
            if not equals or not path:
                raise UsageError(f"--set {assignment}: FIELD=VALUE is expected, as in --set stages.0.epochs=3")
            try:
                _put(tree, path.split("."), yaml.safe_load(value))
            except (KeyError, IndexError, ValueError, TypeError):
                raise UsageError(
                    f"--set {path}: this recipe has no such field ('sparsify recipes show NAME' shows them; "
                    f"it has {len(self.stages)} stages, counted from 0)"
                ) from None
            except yaml.YAMLError:
                raise UsageError(f"--set {path}: '{value}' is not a YAML value") from None
        return validate(Recipe, tree, "--set")


def _put(tree: Any, path: list[str], value: Any) -> None:
    for name in path[:-1]:
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    if isinstance(tree, list):
        tree[int(path[-1])] = value
    elif tree is None or path[-1] not in tree:
        raise KeyError(path[-1])
    else:
        tree[path[-1]] = value


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as the YAML that `load_recipe` reads."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipes().iterdir() if p.name.endswith(".yaml"))


def default_recipe(learns: bool) -> str:
    """The recipe for those who name none: with images to learn from, or without."""
    return "distill" if learns else "calibrate"


def recipe_text(name_or_file: str) -> str:
    """The YAML of the built-in recipe of that name, or of a file.

    Raises:
        UsageError: no such recipe.
    """
    if name_or_file in recipe_names():
        return str((_recipes() / f"{name_or_file}.yaml").read_text(encoding="utf-8"))
    if Path(name_or_file).is_file():
        return Path(name_or_file).read_text(encoding="utf-8", errors="replace")
    raise UsageError(f"no recipe '{name_or_file}': give a YAML file or one of {', '.join(recipe_names())}")


def load_recipe(name_or_file: str) -> Recipe:
    """The built-in recipe of that name, or the one in a YAML file.

    Raises:
        UsageError: no such recipe, not YAML, an unknown key or a value out of range.
    """
    try:
        tree = yaml.safe_load(recipe_text(name_or_file))
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {name_or_file} is not YAML: {' '.join(str(error).split())}") from None
    return validate(Recipe, tree or {}, f"recipe {name_or_file}:")


def _recipes() -> Any:
    inside = resources.files("sparsify") / "recipes"
    return inside if inside.is_dir() else Path(__file__).resolve().parent.parent / "recipes"


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


Count = Annotated[int, Field(ge=1)]


class Losses(Frozen):
    """Weights of the losses, 0 for none, and what they are made of. p_t, p_s: class probabilities of teacher and student."""

    classification: Weight = Field(0.0, description="cross-entropy with the labels (soft under mixup); needs labels")
    logits: Weight = Field(0.0, description="T^2 KL(p_t || p_s) at temperature T, nats, mean over images")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="T of `logits`")
    tokens: Weight = Field(
        0.0, description="mean squared error of the patch tokens behind the final norm, those present"
    )
    features: Weight = Field(
        0.0, description="mean over blocks of the squared error behind each block, as a share of the teacher's squares"
    )
    attention: Weight = Field(0.0, description="the predictor's attention against the true one, see the next two")
    attention_form: Literal["mse-sum", "kl"] = Field(
        "mse-sum",
        description="mse-sum: squares summed over images, heads, rows and keys (the paper); kl: nats, mean over rows",
    )
    attention_blocks: Literal["mean", "rms"] = Field(
        "mean",
        description="how an image's `attention` in each block becomes one number; rms: the root of the mean of the squares, "
        "for which the blocks that are furthest off count most",
    )
    mass: Weight = Field(
        0.0, description="share of the true attention on keys that the predictor drops, mean over rows and blocks"
    )
    attention_target: Literal["teacher", "self"] = Field(
        "teacher",
        description="whose dense attention is the true one: the teacher's, or the student's own (authors' option)",
    )
    coefficients: Literal["all", "kept"] = Field(
        "all",
        description="token-lowrank, what `attention` and `mass` look at: all coefficients (the paper), or the kept",
    )
    basis: Literal["raw", "used"] = Field(
        "raw", description="token-lowrank: W_up with its signs (the paper), or with sign and threshold as it is used"
    )
    basis_l1: Weight = Field(0.0, description="sum of |W_up| over all blocks (token-lowrank)")
    reference_batch: Count = Field(
        168, description="images over which a summed loss is summed: B images count reference_batch / B"
    )

    @property
    def any(self) -> bool:
        """Whether any loss has a weight."""
        return self.backbone or self.predictors

    @property
    def backbone(self) -> bool:
        """Whether a loss reaches the backbone through the model's output."""
        return max(self.classification, self.logits, self.tokens, self.features) > 0

    @property
    def pairs(self) -> bool:
        """Whether a loss compares attentions, for which it needs queries and keys."""
        return max(self.attention, self.mass) > 0

    @property
    def predictors(self) -> bool:
        """Whether a loss reaches the predictors: the choice of keys itself has no gradient."""
        return self.pairs or self.basis_l1 > 0


class Optimiser(Frozen):
    """timm's optimiser of that name; biases, norms and what the model names are not decayed, as in timm."""

    name: str = "adamw"
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    weight_decay: Weight = 0.05
    betas: tuple[Share, Share] | None = Field(None, description="null: the optimiser's own, (0.9, 0.999) of adamw")
    eps: Annotated[float, Field(gt=0)] | None = None
    momentum: Share = Field(0.9, description="of sgd and its relatives")
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(None, description="largest norm of the gradient")
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None


class Schedule(Frozen):
    """Learning rate step by step: from `warmup_lr` up to lr, then to `min_lr`."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = Field(0.0, description="epochs")
    warmup_share: Share = Field(0.0, description="the same as a share of the stage's steps; the larger counts")
    warmup_lr: Weight = 0.0
    min_lr: Weight = 0.0


class Augmentation(Frozen):
    """timm's training transform and mixup. `form: eval` is the model's own evaluation transform, and nothing else."""

    form: Literal["eval", "train"] = "train"
    scale: tuple[Share, Share] = Field((0.08, 1.0), description="share of the picture's area that is cut out")
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: Share = 0.5
    color_jitter: Weight = 0.0
    auto_augment: str | None = Field(None, description="timm's string: rand-m9-mstd0.5-inc1, ...")
    interpolation: str | None = Field(None, description="null: the model's own")
    erase: Share = Field(0.0, description="probability of random erasing (pixels)")
    mixup: Weight = Field(0.0, description="alpha")
    cutmix: Weight = Field(0.0, description="alpha")
    mixup_prob: Share = 1.0
    mixup_switch: Share = Field(0.5, description="probability of cutmix where both are on")
    smoothing: Share = Field(0.0, description="label smoothing")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return max(self.mixup, self.cutmix) > 0


class Anneal(Frozen):
    """The share of keys that is kept falls in a straight line from `start` to the target over the first part of a stage."""

    start: Annotated[float, Field(gt=0, le=1)] = 1.0
    until: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of the stage's steps")


class Stage(Frozen):
    """A stage: at least one of `epochs` and `steps`; whichever is over first ends it."""

    name: str = "distill"
    train: Literal["predictors", "attention", "backbone", "all"] = Field(
        "backbone",
        description="attention: of the backbone its attention modules alone; what a few hundred images cannot teach anew "
        "(MLPs, norms, head) stays as it was pretrained",
    )
    attention: Literal["sparse", "dense"] = Field(
        "sparse",
        description="of the student's forward pass; dense: its features are those without sparsity, all tokens",
    )
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    steps: Count | None = Field(None, description="optimiser steps")
    batch_size: Count = Field(16, description="images of a step, over all processes and micro-batches")
    losses: Losses = Losses()
    optimiser: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    augmentation: Augmentation = Augmentation()
    keep: Anneal | Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of keys while training: a number, or annealed; null: the model's own"
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="stochastic depth of the last block")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="decay of the weights' running mean")
    cache_teacher: bool = Field(False, description="the teacher's outputs on disk, computed once; without augmentation")
    grad_checkpointing: bool = Field(False, description="recompute each block in the backward: less memory, 1.3x time")
    validate_every: Count | None = Field(
        1, description="epochs between two validations; null: 1 with --val, else at the end alone"
    )

    @property
    def moves_backbone(self) -> bool:
        """Whether weights of the dense model learn, all of them or some."""
        return self.train != "predictors"

    @property
    def moves_predictors(self) -> bool:
        """Whether predictors may learn: they do where a loss reaches them."""
        return self.train in ("predictors", "all")

    @model_validator(mode="after")
    def _whole(self) -> Stage:
        if self.epochs is None and self.steps is None:
            raise ValueError(f"stage '{self.name}' has neither epochs nor steps")
        if not self.losses.any:
            raise ValueError(f"stage '{self.name}' trains nothing: every loss has weight 0")
        if self.train == "predictors" and not self.losses.predictors:
            raise ValueError(
                f"stage '{self.name}' trains nothing: predictors learn from the losses attention, mass and basis_l1 only"
            )
        if not self.moves_predictors and not self.losses.backbone:
            raise ValueError(
                f"stage '{self.name}' trains nothing: the backbone learns from classification, logits, tokens or features"
            )
        if self.cache_teacher and (self.augmentation.form != "eval" or self.augmentation.mixes):
            raise ValueError(
                f"stage '{self.name}': cache_teacher needs augmentation.form eval, without mixup and cutmix"
            )
        if self.cache_teacher and self.losses.pairs and self.losses.attention_target == "teacher":
            raise ValueError(
                f"stage '{self.name}': cache_teacher holds no attention: the losses attention and mass need the teacher"
            )
        if self.cache_teacher and self.losses.features > 0:
            raise ValueError(
                f"stage '{self.name}': cache_teacher holds logits and patch tokens, not the loss features'"
            )
        if self.augmentation.mixes and self.batch_size % 2:
            raise ValueError(f"stage '{self.name}': mixup and cutmix need an even batch_size, not {self.batch_size}")
        return self
