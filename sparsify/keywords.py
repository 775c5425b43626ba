"""Keywords of the public functions (`sparsify.api`), which say there what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from sparsify.processes import Say

Progress = bool | Callable[[str, int, int | None], None]
"""True: bars in a notebook or at a terminal, lines elsewhere; a function: called with step, done, total (None: unknown)."""


class RecipeOptions(TypedDict, total=False):
    """Keywords of `convert` that are fields of `SparsityConfig` or `Recipe`."""

    predictor: str | None
    rank: Any
    tail: str | None
    cells: Any
    spread: str | None
    granularity: str | None
    tile: tuple[int, int] | None
    fold: bool | None
    token_lowrank: Mapping[str, Any] | None
    tokens: Mapping[str, Any] | None
    description: str | None
    calib_images: int | None
    seed: int | None
    start: str | None
    precision: str | None
    hold_back: float | None
    repair: Mapping[str, Any] | None
    stages: Sequence[Any] | None


class PreprocessingOptions(TypedDict, total=False):
    """Keywords of `convert` and `evaluate`: fields of `sparsify.images.preprocessing.Preprocessing`."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    crop_pct: float | None
    interpolation: str | None
    class_map: str | Path | None


class ConvertOptions(RecipeOptions, PreprocessingOptions, total=False):
    """Further keywords of `convert`: target, training, model and device."""

    target_macs: float | Sequence[float] | None
    target_latency: float | Sequence[float] | None
    runtime: str
    calibrate_only: bool
    allow_nonfinite: bool
    val: str | Path | None
    resume: bool
    num_classes: int | None
    img_size: int | None
    ema: bool | None
    device: str | torch.device | None
    dtype: str | torch.dtype
    batch_size: int
    micro_batch: int
    workers: int
    backend: str | None
    say: Say | None
    progress: Progress


class ComputeOptions(TypedDict, total=False):
    """Keywords of `profile` and `evaluate` that say how they compute (`sparsify.processes.Compute`)."""

    batch_size: int
    device: str | torch.device
    dtype: str | torch.dtype
    backend: str | None
    kernel_precision: str | None


class ProfileOptions(ComputeOptions, total=False):
    """Keywords of `profile`."""

    img_size: int | tuple[int, int] | None
    budget: float | None
    backbone_changed: bool
    measure: bool
    repeats: int | None
    budget_s: float
    count_as: str


class AgainstOptions(ComputeOptions, total=False):
    """Keywords of `profile_against`."""

    budget: float | None
    repeats: int | None
    budget_s: float
    backbone_changed: bool
    say: Say | None


class EvaluateOptions(ComputeOptions, PreprocessingOptions, total=False):
    """Keywords of `evaluate`."""

    workers: int
    no_labels: bool
    limit: int | None
    seed: int
    budget: float | None
    adaptive: float | None
    backbone_changed: bool
    name: str
    strict: bool
    say: Say | None
    progress: bool | Callable[[int, int | None], None]


class SweepOptions(TypedDict, total=False):
    """Keywords of `sweep`."""

    no_labels: bool
    limit: int | None
    calib_images: int | None
    seed: int | None
    num_classes: int | None
    img_size: int | None
    ema: bool | None
    batch_size: int | None
    device: str | torch.device | None
    dtype: str | torch.dtype
    backend: str | None
    workers: int
    say: Say | None
    progress: Progress


class ViewOptions(TypedDict, total=False):
    """Keywords of `show` and `report` that say what is drawn."""

    queries: Sequence[str | tuple[float, float]]
    layers: str | Sequence[int] | None
    heads: str | Sequence[int] | None
    say: Say | None
    progress: Progress


class PushOptions(TypedDict, total=False):
    """Keywords of `push`."""

    private: bool
    revision: str | None
    message: str | None
    licence: str | None
    force: bool
    say: Say | None


class PredictOptions(ComputeOptions, PreprocessingOptions, total=False):
    """Keywords of `predict`."""

    workers: int
    budget: float | None
    adaptive: float | None
    strict: bool
    limit: int | None
    seed: int
    say: Say | None
    progress: Progress
