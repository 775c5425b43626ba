"""The library in four functions; `import sparsify` shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify import checkpoint
from sparsify import conversion as _conversion
from sparsify import evaluation as _evaluation
from sparsify import profiling as _profiling
from sparsify.config import Recipe, load_recipe
from sparsify.metrics import Evaluation


def convert(
    name: str,
    *,
    keep: float | Sequence[float] | None = None,
    recipe: str | Recipe = "calibrate",
    output: str | Path = "model.safetensors",
    weights: str | Path | None = None,
    data: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    force: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    **changes: Any,
) -> _conversion.Conversion:
    """Convert a timm model and write it to `output`.

    Args:
        name: alias, timm name, `hf-hub:` or `local-dir:` name, or `digits`.
        keep: share of keys that each query attends to, 0 < keep <= 1; one number, or one for each block.
        recipe: name, YAML file or `Recipe`.
        weights: local checkpoint (.safetensors, .pth) of that architecture.
        data: folder or data set to calibrate on; labels are not used. None: the built-in pictures.
        changes: fields of `SparsityConfig` or `Recipe` (predictor, rank, tail, cells, seed, calib_images, ...).

    Raises:
        SparsifyError: one line: what was wrong, what was expected, what to do.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = chosen.override(keep=keep if keep is None or isinstance(keep, float | int) else tuple(keep), **changes)
    return _conversion.convert(
        name, chosen, Path(output), weights=None if weights is None else Path(weights), num_classes=num_classes,
        img_size=img_size, images=None if data is None else str(data), force=force, device=device, say=say,
    )  # fmt: skip


def load(path: str | Path, img_size: int | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """The sparse model of a file, eval mode; see `sparsify.checkpoint.load`."""
    return checkpoint.load(path, img_size, device)


def profile(model: nn.Module | str | Path, **options: Any) -> _profiling.Profile:
    """MACs and latency of a sparse model (or its file) beside its dense original; see `sparsify.profiling.profile`."""
    return _profiling.profile(model if isinstance(model, nn.Module) else load(model), **options)


def evaluate(model: nn.Module | str | Path, images: str | Path, **options: Any) -> Evaluation:
    """Accuracy of a sparse model beside its dense original on a labelled folder, timm data set or `digits`.

    See `sparsify.evaluation.evaluate_images` for the options (batch_size, workers, device, dtype, strict).
    """
    sparse = model if isinstance(model, nn.Module) else load(model)
    return _evaluation.evaluate_images(sparse, str(images), **options)
