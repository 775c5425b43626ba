"""The training half of `convert`: a calibrated model in, the better of it and the fine-tuned one out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from sparsify import processes
from sparsify.config import SparsityConfig
from sparsify.fit.finetune.plan import Plan, RunOptions
from sparsify.fit.finetune.run import RunResult, finetune
from sparsify.fit.finetune.run_folder import RunFolder
from sparsify.models import checkpoint
from sparsify.nn.adaptive import Sureness
from sparsify.nn.folding import fold
from sparsify.recipe import Recipe, load_recipe, recipe_yaml


@dataclass(frozen=True)
class Calibrated:
    """A sparse model before any training."""

    model: nn.Module
    config: SparsityConfig
    recipe: Recipe  # reproduces it
    words: str  # which images were used
    images: int  # how many
    schedules: Mapping[float, SparsityConfig] = field(default_factory=dict)  # chosen for a target, by budget
    sureness: Mapping[float, Sureness] = field(default_factory=dict)  # of these


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning made."""

    model: nn.Module  # the fine-tuned model, or the calibrated one if that is better; CPU, eval mode
    config: SparsityConfig  # of `model`
    start: Calibrated
    outcome: RunResult
    plan: Plan

    def provenance(self) -> dict[str, Any]:
        """What the file's header says of the fine-tuning."""
        changed = self.outcome.changed
        backbone = self.plan.repair is not None or any(p.stage.moves_backbone for p in self.plan.stages)
        return {
            "backbone_changed": changed and backbone,
            "finetuned": {
                "kept": "fine-tuned" if changed else "calibrated",
                "judged_on": self.plan.validated_on,
                "start": asdict(self.outcome.start),
                "best": asdict(self.outcome.best),
                "steps": self.outcome.steps,
                "stopped": self.outcome.stopped,
                "precision": self.plan.precision,
                "processes": processes.world(),
                "images": max((p.images for p in self.plan.stages), default=0),
                "repair": self._repair(),
            },
        }

    def _repair(self) -> str | None:
        if self.plan.unrepaired:
            return f"left out: {self.plan.unrepaired}"
        return None if self.plan.repair is None else "done"


def tune(
    dense: nn.Module,
    plan: Plan,
    run: RunFolder,
    how: RunOptions,
    calibrated: Callable[[], Calibrated],
    header: Callable[[Calibrated], checkpoint.Header],
    resume: bool,
    force: bool,
) -> Tuned:
    """Calibrates `dense` in place by `calibrated`, or resumes an interrupted run, trains, and returns the better model.

    Args:
        header: of a file of the calibrated model.
        resume, force: see `RunFolder.open`, which raises `SparsifyError`, as `finetune` does.
    """
    teacher = copy.deepcopy(dense)
    with processes.agree():  # no process writes before all have looked
        begun, state = run.open(plan.identity, resume, force, how.listener.say)
    if begun:
        start = _resumed(run)
    else:
        start = calibrated()
        if processes.main():
            run.begin(plan.identity, recipe_yaml(start.recipe))
            checkpoint.save(start.model, run.start, header(start))
        processes.barrier()
    how.listener.say(_announced(plan))
    left_out = f"repair left out: {plan.unrepaired}" if plan.unrepaired else ""
    for line in filter(None, (left_out, plan.note, plan.warning)):
        how.listener.say(line)
    student, config = start.model, start.config
    outcome = finetune(student, teacher, plan, how, state)
    if outcome.changed:
        student = student.to("cpu")
        if plan.unfolds and not (plan.folds_again and fold(student)):
            config = config.model_copy(update={"fold": False})
    else:
        student = checkpoint.load(run.start)
    how.listener.say(verdict(outcome, plan))
    return Tuned(student, config, start, outcome, plan)


def verdict(outcome: RunResult, plan: Plan) -> str:
    """Which model was kept, and both scores."""
    start, best = outcome.start, outcome.best
    where = f"on {plan.validated_on} ({start.images})"
    if not outcome.changed:
        return f"kept the calibrated model: fine-tuning did not get past its {start.words()} {where}"
    return f"kept the fine-tuned model: {best.words()}; calibrated only {start.words()}; {where}"


def _announced(plan: Plan) -> str:
    words = [f"least squares on up to {plan.repair[0].images} images, crops included"] if plan.repair else []
    stages = ", ".join([*words, *(f"{p.stage.name} {p.steps} steps of {p.stage.batch_size}" for p in plan.stages)])
    return f"fine-tuning ({plan.precision}): {stages}; judged on {plan.validated_on}"


def _resumed(run: RunFolder) -> Calibrated:
    model, header, _ = checkpoint.read(run.start)
    images = int(header.provenance["calibration"]["images"])
    several = {budget: each.config for budget, each in header.schedules.items()}
    return Calibrated(model, header.config, load_recipe(str(run.recipe)), "as before", images, several)
