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
    """A setting before it is measured."""

    name: str  # keep-0.1 (sparse attention, all tokens) or macs-0.7 (a searched schedule); names its recipe
    asked: float  # the requested fraction of keys, or of the dense model's MACs; it is part of the name
    config: SparsityConfig  # of the sparse model, complete
    damage: float | None  # KL that the search predicts for its schedule; None: nothing was searched

    @property
    def kind(self) -> str:
        """keep or macs."""
        return self.name.partition("-")[0]


@dataclass(frozen=True)
class Setting:
    """A setting with its figures."""

    choice: SweepChoice
    recipe: Recipe  # converts the model to it
    profile: Profile  # MACs, theoretical
    evaluation: Evaluation  # on the same images as all others; its throughput is not measured
    timing: Timing  # of the sparse form without dense fallback, in one interleaved run with all others; ms
    speed: Timing  # time of the dense model divided by the setting's, by round

    @property
    def share(self) -> float:
        """Of the dense model's MACs."""
        return self.profile.macs_sparse / self.profile.dense.macs


@dataclass(frozen=True)
class Sweep:
    """What `sweep` measured."""

    model: str  # as requested, as `weights`
    weights: str | None
    architecture: str  # timm's name
    classes: int  # outputs, 0 without a classifier
    images: str  # evaluation images, in words
    calibration: str  # calibration images, in words
    labelled: bool  # whether the evaluation images have labels
    settings: tuple[Setting, ...]  # keeps first, in the requested order
    dense: Timing  # of the dense model
    skipped: Mapping[str, str]  # impossible settings, with the reason
    conditions: Mapping[str, Any]  # of the timing: the keys `sparsify.measure.conditions.SWEEP`
    convert: tuple[str, ...]  # the command that makes a setting's model, up to its recipe
    seconds: float
