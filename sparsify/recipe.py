"""How to make a sparse model, as YAML: `Recipe`, found by name or file, any field overridden by its path."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from sparsify.config import Frozen, SparsityConfig, validate
from sparsify.errors import UsageError
from sparsify.stage import Stage


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
