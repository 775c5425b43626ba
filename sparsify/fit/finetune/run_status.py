"""How a run is going: its circumstances, where it stands, which weights are the best so far, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsify.fit.finetune import saved_state
from sparsify.fit.finetune.log import Record
from sparsify.fit.finetune.validation import Judge, Score

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """How a run ended; the student has the best weights then.

    Attributes:
        start, best: scores of the model that came in and of the one that goes out, on held-back images.
        changed: the best is not the model that came in.
        steps: optimiser steps done.
        seconds: wall time of this process, since it began or resumed.
        stopped: '' where the run went to its end; else why it did not.
    """

    start: Score
    best: Score
    changed: bool
    steps: int
    seconds: float
    stopped: str = ""


@dataclass(frozen=True)
class How:
    """Circumstances of a run that do not change its result: where it writes, how often it saves, whom it tells."""

    folder: Path
    device: str = "cpu"
    save_minutes: float = 5.0
    say: Callable[[str], None] = lambda line: None
    progress: Callable[[str, int, int, str], None] = lambda step, done, total, note: None


@dataclass
class Standing:
    """Where a run stands between two steps.

    Attributes:
        stage, step: number of the stage and steps of it that are done; done: steps in all.
        best_weights: None while the best is the model that came in.
    """

    start: Score
    best: Score
    best_weights: Weights | None = None
    stage: int = 0
    step: int = 0
    done: int = 0
    saved_at: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, start: Score, resume: saved_state.State | None) -> Standing:
        """Of a run that begins with a model of that score, or goes on from a saved state."""
        if resume is None:
            return cls(start, start)
        facts, best = resume.facts, resume.part("best") or None
        return cls(Score(**facts["start"]), Score(**facts["best"]), best, facts["stage"], facts["step"], facts["done"])

    def row(self, epoch: float, score: Score, weights: str, best: bool) -> dict[str, Any]:
        """A row of `Record.validation`."""
        place = {"step": self.done, "stage": self.stage, "epoch": epoch, "images": score.images, "weights": weights}
        return {**place, "agreement": score.agreement, "kl": score.kl, "top1": score.top1, "best": int(best)}

    def compare(self, model: nn.Module, judge: Judge, record: Record | None, how: How, epoch: float, kind: str) -> None:
        """Scores the weights of `model` and remembers them where they are the best so far."""
        score = judge(model)
        best = score.better_than(self.best)
        if best:
            self.best = score
            self.best_weights = {k: t.detach().cpu().clone() for k, t in model.state_dict().items()}
        if record is not None:
            record.validation(self.row(epoch, score, kind, best))
        words = "least squares" if kind == "repaired" else f"after {epoch:.3g} epochs of stage {self.stage + 1}"
        how.say(f"{words}: {score.words()}{' (best so far)' if best else ''}")
