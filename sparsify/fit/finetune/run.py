"""A run from its first stage to its last, and the best weights at its end."""

from __future__ import annotations

import contextlib
import time
from typing import Any, cast

from torch import nn

from sparsify import processes
from sparsify.errors import Interrupted
from sparsify.fit.calibrate.repair import repair
from sparsify.fit.finetune import devices, saved_state, trainable
from sparsify.fit.finetune.interrupts import Interrupts
from sparsify.fit.finetune.log import Record
from sparsify.fit.finetune.loop import StageRun
from sparsify.fit.finetune.plan import Plan
from sparsify.fit.finetune.run_status import How, Outcome, Standing
from sparsify.fit.finetune.validation import Judge
from sparsify.nn.folding import unfold


def finetune(
    student: nn.Module, teacher: nn.Module, plan: Plan, how: How, resume: saved_state.State | None = None
) -> Outcome:
    """Runs the stages of `plan` and leaves the best weights in `student`.

    Args:
        student: sparse, as calibrated; trained in place. Predictors that learn are unfolded.
        teacher: the dense model that it was made from.
        resume: a state that a former call with the same arguments saved.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    begun = time.monotonic()
    accelerator = devices.accelerator(plan.precision, how.device)
    device = accelerator.device
    student.to(device)
    teacher.to(device).eval()
    if plan.unfolds:
        unfold(student)
    judge = Judge(plan.judged, teacher, str(device))
    standing = Standing.of(judge(student), resume)
    if resume is not None:
        student.load_state_dict(resume.part("student"))
    stopped = ""
    with Interrupts() as interrupts, _record(plan, how, resume) as record:
        if resume is None and record is not None:
            record.validation(standing.row(0.0, standing.start, "start", True))
        if resume is None and plan.repair is not None:
            _repair(student, teacher, plan, how, judge, standing, record, interrupts)
        for number in range(standing.stage, len(plan.stages)):
            standing.stage, resumed = number, resume
            if resume is None or resume.facts["stage"] != number:
                standing.step, resumed = 0, None
            run = StageRun(student, teacher, plan, number, accelerator, judge, how, standing, record, interrupts)
            stopped = run.run(resumed)
            if stopped:
                break
    if standing.best_weights is not None:
        student.load_state_dict(standing.best_weights)
    student.requires_grad_(True).eval()
    trainable.set_drop_path(student, 0.0)
    cast(Any, student).set_grad_checkpointing(False)
    processes.barrier()
    seconds = time.monotonic() - begun
    changed = standing.best_weights is not None
    return Outcome(standing.start, standing.best, changed, standing.done, seconds, stopped)


def _repair(
    student: nn.Module, teacher: nn.Module, plan: Plan, how: How, judge: Judge, standing: Standing, record: Record | None,
    interrupts: Interrupts,
) -> None:  # fmt: skip
    """The least squares before the first stage; its outcome is the first to be compared with what came in."""
    assert plan.repair is not None
    settings, images = plan.repair
    student.eval()

    def tell(step: str, done: int, total: int) -> None:
        if interrupts.asked:
            stopped = Interrupted(f"interrupted before the first step: --resume goes on from what is in {how.folder}")
            vars(stopped)["agreed"] = True  # a launcher tells all processes
            raise stopped
        how.progress(step, done, total, "blocks")

    batches = (x.to(next(student.parameters()).device) for x in images)
    repair(student, teacher, batches, settings, tell)
    standing.compare(student, judge, record, how, 0.0, "repaired")


def _record(plan: Plan, how: How, resume: saved_state.State | None) -> Any:
    if not processes.main():
        return contextlib.nullcontext()
    names = [planned.stage.name for planned in plan.stages]
    return Record(how.folder, names, None if resume is None else resume.facts["done"], how.say)
