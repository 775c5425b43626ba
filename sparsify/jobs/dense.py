"""What every job that starts from a dense model needs: the model, checked against its recipe, and calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor, nn

from sparsify.config import SparsityConfig, Target
from sparsify.errors import UsageError
from sparsify.images import datasets
from sparsify.models import building, names, pretrained
from sparsify.models.digits import network
from sparsify.nn import graft, hosts
from sparsify.recipe import Recipe

PROBE_IMAGES = 64  # of the calibration's that a schedule is chosen on


CALIBRATION_BATCH = 16  # images; bounds the memory of the widest step, the reference attention at four ranks


def _fitted_first(recipe: Recipe, target: Target | None) -> SparsityConfig:
    """What is calibrated: of a recipe's tokens a search takes the way and the importance, and chooses the stages itself."""
    return recipe.sparsity if target is None else recipe.sparsity.model_copy(update={"tokens": None})


def _loaded(
    name: str, recipe: Recipe, target: Target | None, weights: Path | None, num_classes: int | None,
    img_size: int | None, say: Callable[[str], None],
) -> tuple[names.Source, nn.Module]:  # fmt: skip
    """The dense model on the CPU, once `recipe` is known to fit it."""
    source = names.resolve(name)
    if source.note:
        say(source.note)
    frame = building.skeleton(source, num_classes, img_size)  # what does not fit is refused before anything is loaded
    hosts.check(frame, source.asked)
    graft.check_config(frame, _fitted_first(recipe, target))
    if recipe.start == "random" and recipe.sparsity.predictor != "token-lowrank":
        raise UsageError("start random is the authors' way for predictor token-lowrank: use start closed-form")
    model = pretrained.load(source, weights, num_classes, img_size)
    if differs := building.note(model, source):
        say(differs)
    return source, model


def calibration_images(
    model: nn.Module, source: names.Source, recipe: Recipe, images: str | None, device: str, size: int, workers: int
) -> tuple[Callable[[], Iterator[Tensor]], str]:
    """The calibration images, read anew at each pass, and what they are in words."""
    transform = datasets.transform(datasets.data_config(model))
    n, seed = recipe.calib_images, recipe.seed
    built_in_digits = source.architecture == network.ARCHITECTURE
    if images is not None:
        found = datasets.unlabelled(images, n, seed, transform, size, workers)
        words = f"up to {n} images of {images} (labels are not used)"
    else:
        found = datasets.builtin_calibration(built_in_digits, n, seed, transform, size, workers)
        words = f"{n} {'digits of the training split' if built_in_digits else 'built-in pictures'}: no --data was given"
    return lambda: (x.to(device) for x in found), words
