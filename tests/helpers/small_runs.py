"""Fine-tuning runs of seconds on the built-in digits: recipes, the conversion, and readers of what a run wrote."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

from sparsify.config import validate
from sparsify.jobs.convert import Conversion, ImageSources, OutputOptions
from sparsify.jobs.convert import convert as convert_job
from sparsify.jobs.dense import DenseRequest
from sparsify.processes import Compute, Listener
from sparsify.recipe import Recipe
from sparsify.reports import training_plot

PLAIN = {"form": "eval"}
SMALL: dict[str, Any] = {"precision": "float32", "calib_images": 8, "hold_back": 0.01}
SPARSITY: dict[str, Any] = {"keep": 0.1, "rank": 12, "spread": "none"}
STAGE: dict[str, Any] = {
    "steps": 3, "batch_size": 8, "losses": {"logits": 1.0, "tokens": 0.5}, "augmentation": PLAIN,
    "optimiser": {"lr": 1e-4, "weight_decay": 0.0}, "schedule": {"warmup_share": 0.3},
}  # fmt: skip
ATTENTION: dict[str, Any] = {"attention": 1.0, "attention_form": "kl"}
LOSSES = ("classification", "logits", "tokens", "features", "attention", "basis_l1", "loss", "lr")


def recipe(*stages: dict[str, Any], sparsity: dict[str, Any] | None = None, **more: Any) -> Recipe:
    """A recipe of stages, each like `STAGE` but for what is given; float32, 8 images to calibrate on, 12 to judge by."""
    tree = {**SMALL, "sparsity": {**SPARSITY, **(sparsity or {})}, "stages": [{**STAGE, **s} for s in stages], **more}
    return validate(Recipe, tree, "test")


AUGMENTED: dict[str, Any] = {
    "form": "train",
    "scale": [0.5, 1.0],
    "auto_augment": "rand-m5",
    "erase": 0.3,
    "mixup": 0.4,
    "smoothing": 0.1,
}
STAGES: tuple[dict[str, Any], ...] = (
    {
        "name": "first", "train": "all", "augmentation": AUGMENTED, "ema": 0.8, "drop_path": 0.3, "batch_size": 4,
        "keep": {"start": 0.5, "until": 1.0}, "losses": {"logits": 1.0, "attention": 0.5, "attention_form": "kl"},
    },
    {"name": "second", "cache_teacher": True, "optimiser": {"name": "sgd", "lr": 1e-3}, "batch_size": 4},
)  # fmt: skip
CHOSEN = recipe(*STAGES, repair={"images": 8})
"""All that a resumed run could get wrong: least squares, predictors, a running mean, what is drawn, annealing, a cache."""


def convert(output: Path, chosen: Recipe, picture: bool = False, **more: Any) -> Conversion:
    """`digits` by that recipe, learning from the digits; `picture`: draw the curve (longer than three steps).

    `more`: images, val, and fields of `OutputOptions`, `Compute` and `Listener`.
    """
    images = ImageSources(more.pop("images", "digits"), more.pop("val", None))
    run = OutputOptions(output, **{key: more.pop(key) for key in ("force", "resume", "save_minutes") if key in more})
    listener = Listener(**{key: more.pop(key) for key in ("say", "progress") if key in more})
    with pytest.MonkeyPatch.context() as patch:
        if not picture:
            patch.setattr(training_plot, "draw", lambda *figures: None)
        request, compute = DenseRequest("digits"), Compute(**more)
        return convert_job(request, chosen, run, images=images, compute=compute, listener=listener)


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def metrics(run: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv as text, without how fast it was."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [{name: cell for name, cell in row.items() if name != "images_per_s"} for row in rows]


def validations(run: Path) -> list[dict[str, str]]:
    """Rows of validation.csv as text."""
    return list(csv.DictReader((run / "validation.csv").open()))


def losses(run: Path) -> list[dict[str, float]]:
    """The losses of each step."""
    return [{name: float(row[name]) for name in LOSSES if row[name]} for row in metrics(run)]
