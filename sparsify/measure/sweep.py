"""The results of a sweep: settings, their figures, and the dense model beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.config import SparsityConfig
from sparsify.measure.accuracy import Evaluation
from sparsify.measure.figures import Profile
from sparsify.measure.latency import Timing
from sparsify.recipe import Recipe


@dataclass(frozen=True)
class SweepChoice:
    """A setting before it is measured.

    Attributes:
        name: keep-0.1 (sparse attention, all tokens) or macs-0.7 (a searched schedule); names its recipe.
        asked: the requested share of keys, or of the dense model's MACs; it is part of the name.
        config: of the sparse model, complete.
        damage: KL that the search predicts for its schedule; None: nothing was searched.
    """

    name: str
    asked: float
    config: SparsityConfig
    damage: float | None

    @property
    def kind(self) -> str:
        """keep or macs."""
        return self.name.partition("-")[0]


@dataclass(frozen=True)
class Setting:
    """A setting with its figures.

    Attributes:
        choice: what it is; recipe: converts the model to it.
        profile: MACs, theoretical.
        evaluation: on the same images as all others; its throughput is not measured.
        timing: of the sparse form without dense fallback, in one interleaved run with all others; ms.
        speed: time of the dense model divided by the setting's, by round.
    """

    choice: SweepChoice
    recipe: Recipe
    profile: Profile
    evaluation: Evaluation
    timing: Timing
    speed: Timing

    @property
    def share(self) -> float:
        """Of the dense model's MACs."""
        return self.profile.macs_sparse / self.profile.dense.macs


@dataclass(frozen=True)
class Sweep:
    """What `sweep` measured.

    Attributes:
        model, weights: as requested; architecture: timm's name; classes: outputs, 0 without a classifier.
        images: evaluation images, in words; calibration: calibration images, in words.
        labelled: whether those images have labels.
        settings: keeps first, in the requested order; dense: the dense model's time.
        skipped: impossible settings, with the reason.
        conditions: of the timing: batch_size, img_size, dtype, device, device_name, threads, runs, backend and versions.
        convert: the command that makes a setting's model, up to its recipe.
    """

    model: str
    weights: str | None
    architecture: str
    classes: int
    images: str
    calibration: str
    labelled: bool
    settings: tuple[Setting, ...]
    dense: Timing
    skipped: Mapping[str, str]
    conditions: Mapping[str, Any]
    convert: tuple[str, ...]
    seconds: float
