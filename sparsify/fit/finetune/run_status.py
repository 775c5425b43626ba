"""The options of a run, its status between two steps, and its result."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsify.fit.finetune.saved_state import SavedState
from sparsify.fit.finetune.validation import ValidationScore
from sparsify.processes import Listener


@dataclass(frozen=True)
class RunResult:
    """How a run ended; the student has the best weights then.

    Attributes:
        start, best: scores of the model before and after, on the validation images.
        changed: the best weights are not those of the start.
        steps: optimiser steps done.
        seconds: wall time of this process, since it began or resumed.
        stopped: why the run ended before its last step, or ''.
    """

    start: ValidationScore
    best: ValidationScore
    changed: bool
    steps: int
    seconds: float
    stopped: str = ""


@dataclass(frozen=True)
class RunOptions:
    """What does not change the result of a run.

    Attributes:
        folder: see `run_folder`.
        save_minutes: time between two saved states.
    """

    folder: Path
    device: str = "cpu"
    save_minutes: float = 5.0
    listener: Listener = field(default_factory=Listener)


@dataclass
class RunStatus:
    """Where a run stands between two steps.

    Attributes:
        best_weights: None while the start is the best.
        stage: number of the stage; step: its steps that are done; done: steps of all stages that are done.
    """

    start: ValidationScore
    best: ValidationScore
    best_weights: dict[str, Tensor] | None = None
    stage: int = 0
    step: int = 0
    done: int = 0
    saved_at: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, start: ValidationScore, resume: SavedState | None) -> RunStatus:
        """Of a run that begins with a model of that score, or resumes from a saved state."""
        if resume is None:
            return cls(start, start)
        facts = resume.facts
        scores = ValidationScore(**facts["start"]), ValidationScore(**facts["best"])
        return cls(*scores, resume.part("best") or None, facts["stage"], facts["step"], facts["done"])

    def update_best(self, score: ValidationScore, model: nn.Module) -> bool:
        """Whether `score` is the best so far; if so, the weights of `model` are remembered."""
        better = score.better_than(self.best)
        if better:
            self.best = score
            self.best_weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
        return better

    def row(self, epoch: float, score: ValidationScore, weights: str, best: bool) -> dict[str, Any]:
        """A row of `TrainingLog.write_validation`."""
        row = {"step": self.done, "stage": self.stage, "epoch": epoch, "weights": weights, "best": int(best)}
        return row | score.as_dict()
