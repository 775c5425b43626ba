"""A run from its first stage to its last, and the best weights at its end."""

from __future__ import annotations

import contextlib
import time
from typing import Any, cast

from torch import nn

from sparsify import processes
from sparsify.errors import field
from sparsify.fit.calibrate.repair import repair
from sparsify.fit.finetune import devices, trainable
from sparsify.fit.finetune.interrupts import Interrupts
from sparsify.fit.finetune.log import TrainingLog
from sparsify.fit.finetune.loop import RunContext, StageRun, interrupted
from sparsify.fit.finetune.plan import Plan
from sparsify.fit.finetune.run_status import RunOptions, RunResult, RunStatus
from sparsify.fit.finetune.saved_state import SavedState
from sparsify.fit.finetune.validation import Validator
from sparsify.nn.folding import unfold


def finetune(
    student: nn.Module, teacher: nn.Module, plan: Plan, options: RunOptions, resume: SavedState | None = None
) -> RunResult:
    """Runs the stages of `plan` and leaves the best weights in `student`.

    Args:
        student: sparse, as calibrated; trained in place. Predictors that are trained are unfolded.
        teacher: the dense model that it was made from.
        resume: a state that an earlier call with the same arguments saved.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    begun = time.monotonic()
    accelerator = devices.accelerator(plan.precision, options.device)
    student.to(accelerator.device)
    teacher.to(accelerator.device).eval()
    if plan.unfolds:
        unfold(student)
    validator = Validator(plan.validation, teacher, str(accelerator.device))
    status = RunStatus.of(validator(student), resume)
    if resume is not None:
        student.load_state_dict(resume.part("student"))
    stopped = ""
    with Interrupts() as interrupts, _training_log(plan, options, resume) as log:
        context = RunContext(student, teacher, plan, options, accelerator, validator, status, log, interrupts)
        if resume is None and log is not None:
            log.write_validation(status.row(0.0, status.start, "start", True))
        if resume is None and plan.repair is not None:
            _repair(context)
        for number in range(status.stage, len(plan.stages)):
            status.stage, resumed = number, resume
            if resume is None or resume.facts["stage"] != number:
                status.step, resumed = 0, None
            stopped = StageRun(context, number).run(resumed)
            if stopped:
                break
    if status.best_weights is not None:
        student.load_state_dict(status.best_weights)
    student.requires_grad_(True).eval()
    trainable.set_drop_path(student, 0.0)
    cast(Any, student).set_grad_checkpointing(False)
    processes.barrier()
    seconds, changed = time.monotonic() - begun, status.best_weights is not None
    return RunResult(status.start, status.best, changed, status.done, seconds, stopped)


def _repair(context: RunContext) -> None:
    """The least squares before the first stage, and the first validation."""
    assert context.plan.repair is not None
    student, options, (settings, images) = context.student, context.options, context.plan.repair

    def report(step: str, done: int, total: int) -> None:
        if context.interrupts.requested:
            goes_on = f"{field('resume')} goes on from what is in {options.folder}"
            raise interrupted(f"interrupted before the first step: {goes_on}")
        options.listener.progress(step, done, total, "blocks")

    student.eval()
    batches = (x.to(next(student.parameters()).device) for x in images)
    repair(student, context.teacher, batches, settings, report)
    context.validate(student, 0.0, "repaired")


def _training_log(plan: Plan, options: RunOptions, resume: SavedState | None) -> Any:
    """The log, as a context manager; None in all processes but the main one."""
    if not processes.main():
        return contextlib.nullcontext()
    names = [planned.stage.name for planned in plan.stages]
    return TrainingLog(options.folder, names, None if resume is None else resume.facts["done"], options.listener.say)
