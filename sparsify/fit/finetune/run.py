"""A run from its first stage to its last, and the best weights at its end.

Processes and mixed precision come from Hugging Face accelerate: `torchrun` and `accelerate launch` just work.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sparsify import processes
from sparsify.errors import field
from sparsify.fit.calibrate.repair import repair
from sparsify.fit.finetune import trainable
from sparsify.fit.finetune.log import TrainingLog
from sparsify.fit.finetune.loop import Interrupts, RunContext, StageRun, interrupted
from sparsify.fit.finetune.plan import PRECISIONS, Plan, RunOptions
from sparsify.fit.finetune.saved_state import RunStatus, SavedState
from sparsify.fit.finetune.validation import ValidationScore, Validator
from sparsify.images.loaders import Flaws
from sparsify.nn.folding import unfold

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class RunResult:
    """How a run ended; the student has the best weights then."""

    start: ValidationScore  # of the model before, on the validation images
    best: ValidationScore  # and after
    changed: bool  # the best weights are not those of the start
    steps: int  # optimiser steps done
    seconds: float  # wall time of this process, since it began or resumed
    stopped: str = ""  # why the run ended before its last step


def finetune(
    student: nn.Module, teacher: nn.Module, plan: Plan, options: RunOptions, resume: SavedState | None = None
) -> RunResult:
    """Runs the stages of `plan` and leaves the best weights in `student`; raises `Interrupted` once the state is saved.

    `student`: sparse, as calibrated; predictors that are trained are unfolded. `teacher`: the dense model that it was made
    from. `resume`: a state that an earlier call with the same arguments saved.
    """
    begun = time.monotonic()
    accelerator = _accelerator(plan.precision, options.device)
    student.to(accelerator.device)
    teacher.to(accelerator.device).eval()
    if plan.unfolds:
        unfold(student)
    validator = Validator(plan.validation, teacher, str(accelerator.device))
    status = RunStatus.of(validator(student), resume)
    _say(processes.gather(plan.validation.flaws), "validation images", options)
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
            if stopped := StageRun(context, number).run(resumed):
                break
    parts = processes.gather([planned.batches.broken for planned in plan.stages])
    broken = {number: why for part in parts for stage in part for number, why in stage.items()}
    _say([Flaws(len(broken), next(iter(broken.values()), ""))], "training images", options)
    if status.best_weights is not None:
        student.load_state_dict(status.best_weights)
    student.requires_grad_(True).eval()
    trainable.set_drop_path(student, 0.0)
    cast(Any, student).set_grad_checkpointing(False)
    processes.barrier()
    seconds, changed = time.monotonic() - begun, status.best_weights is not None
    return RunResult(status.start, status.best, changed, status.done, seconds, stopped)


def _accelerator(precision: str, device: str) -> Accelerator:
    """A new `Accelerator`: an earlier one of this process may have had another precision."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # the last block's patch rows may feed no loss
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # accelerate takes the current one
    return Accelerator(mixed_precision=PRECISIONS[precision], cpu=chosen.type == "cpu", kwargs_handlers=[unused])


def _repair(context: RunContext) -> None:
    """The least squares before the first stage, and the first validation."""
    assert context.plan.repair is not None
    student, options, (settings, images) = context.student, context.options, context.plan.repair

    def report(step: str, done: int, total: int) -> None:
        if context.interrupts.requested:
            note = f"{field('resume')} goes on from what is in {options.folder}"
            raise interrupted(f"interrupted before the first step: {note}")
        options.listener.progress(step, done, total, "blocks")

    student.eval()
    batches = (x.to(next(student.parameters()).device) for x in images)
    repair(student, context.teacher, batches, settings, report)
    context.validate(student, 0.0, "repaired")


def _say(flaws: list[Flaws], what: str, options: RunOptions) -> None:
    """Tells of images that could not be read, or lost something, in all processes."""
    for line in sum(flaws, Flaws()).lines():
        options.listener.say(f"{what}: {line}")


def _training_log(plan: Plan, options: RunOptions, resume: SavedState | None) -> Any:
    """The log, as a context manager; None in all processes but the main one."""
    if not processes.main():
        return contextlib.nullcontext()
    names = [planned.stage.name for planned in plan.stages]
    return TrainingLog(options.folder, names, None if resume is None else resume.facts["done"], options.listener.say)
