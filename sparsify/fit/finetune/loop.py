"""The loop of one stage: steps, validations, saved states. The same code on one CPU and on many GPUs.

Ctrl-C and SIGTERM are requests that are honoured between two steps.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparsify import processes
from sparsify.errors import Interrupted, field
from sparsify.fit.finetune import saved_state, trainable
from sparsify.fit.finetune.batches import Batch
from sparsify.fit.finetune.log import TrainingLog
from sparsify.fit.finetune.objective import CachedTeacher, Objective, Teacher
from sparsify.fit.finetune.plan import Plan, RunOptions
from sparsify.fit.finetune.run_folder import RunFolder
from sparsify.fit.finetune.saved_state import RunStatus, SavedState, prefixed
from sparsify.fit.finetune.validation import Validator
from sparsify.images.loaders import drawn_number
from sparsify.nn.folding import retract

if TYPE_CHECKING:
    from accelerate import Accelerator


class Interrupts:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a second SIGINT raises KeyboardInterrupt as usual.

    Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self.requested = False
        self.former: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self.former = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@dataclass(frozen=True)
class RunContext:
    """What all stages of a run share."""

    student: nn.Module  # sparse, trained in place
    teacher: nn.Module  # the dense model that it was made from; both on the accelerator's device
    plan: Plan
    options: RunOptions
    accelerator: Accelerator
    validator: Validator
    status: RunStatus
    log: TrainingLog | None  # None in all processes but the main one
    interrupts: Interrupts

    def validate(self, model: nn.Module, epoch: float, weights: str) -> None:
        """Scores the `weights` (current, ema or repaired) of `model`, logs the score, and remembers the best so far."""
        score = self.validator(model)
        best = self.status.update_best(score, model)
        if self.log is not None:
            self.log.write_validation(self.status.row(epoch, score, weights, best))
        after = f"after {epoch:.3g} epochs of stage {self.status.stage + 1}"
        when = "least squares" if weights == "repaired" else after
        self.options.listener.say(f"{when}: {score.words()}{' (best so far)' if best else ''}")


class StageRun:
    """The stage `number` (from 0) of a run."""

    def __init__(self, context: RunContext, number: int) -> None:
        self.context, self.number = context, number
        self.student, self.plan, self.status = context.student, context.plan, context.status
        self.planned = self.plan.stages[number]
        self.stage = stage = self.planned.stage
        trainable.select_parameters(self.student, stage)
        trainable.set_drop_path(self.student, stage.drop_path)
        cast(Any, self.student).set_grad_checkpointing(stage.grad_checkpointing)
        trained = any(planned.stage.moves_backbone for planned in self.plan.stages[: number + 1])
        # queries and keys of a student with the teacher's backbone and dense attention are the teacher's
        differs = trained or self.plan.repair is not None or stage.attention != "dense"
        pairs = stage.losses.pairs and stage.losses.attention_target == "teacher" and differs
        self.teacher = Teacher(context.teacher, stage.losses, pairs)
        self.cached_teacher: CachedTeacher | None = None
        self.steps_per_epoch = self.planned.batches.steps_per_epoch or self.planned.steps
        self.optimizer = trainable.make_optimiser(self.student, stage)
        self.lr_schedule = trainable.lr_schedule(self.optimizer, stage, self.planned.steps, self.steps_per_epoch)
        self.ema = ModelEmaV3(self.student, decay=stage.ema) if stage.ema else None
        self.keep_schedule = trainable.KeepSchedule(self.student, stage, self.planned.steps)

    def run(self, resume: SavedState | None) -> str:
        """Runs the steps that are left; returns why the stage stopped before its end, or ''."""
        if resume is not None:
            saved_state.unpack(self.optimizer, resume.part("optimiser"), resume.facts["optimiser"])
            if self.ema is not None:
                self.ema.module.load_state_dict(resume.part("ema"))
        first, steps, accelerator = self.status.step, self.planned.steps, self.context.accelerator
        if first >= steps:
            return ""
        if self.stage.cache_teacher:
            folder = self.context.options.folder / f"teacher-{self.number}"
            self.cached_teacher = CachedTeacher(self.teacher, self.planned.images, folder)
        objective, optimizer = accelerator.prepare(
            Objective(self.student, self.stage, self.context.validator.scale), self.optimizer
        )
        batches = self.planned.batches.from_step(first)
        validate_every = self.steps_per_epoch * self.planned.validate_every
        start, images = time.monotonic(), 0
        for step in range(first, steps):
            self.keep_schedule.set_step(step)
            self.lr_schedule.step_update(step)
            with _random_numbers(self.plan.seed, self.number, step, accelerator.device):
                self.student.train()
                losses = self._step(objective, optimizer, next(batches))
            if not _finite(losses):
                self.keep_schedule.set_step(None)
                advice = "(lower optimiser.lr, or set optimiser.clip_grad)"
                return f"stage '{self.stage.name}' stopped at step {step + 1}: its loss is not finite {advice}"
            self.status.step, self.status.done = step + 1, self.status.done + 1
            images += self.stage.batch_size
            epoch = (step + 1) / self.steps_per_epoch
            self._report(losses, images / max(1e-9, time.monotonic() - start), epoch)
            if step + 1 == steps or (validate_every and (step + 1) % validate_every == 0):
                if self.ema is not None:
                    self.context.validate(self.ema.module, epoch, "ema")
                else:
                    self.keep_schedule.set_step(None)
                    self.context.validate(self.student, epoch, "current")
            self._save_or_stop()
        self.keep_schedule.set_step(None)
        return ""

    def _step(self, objective: nn.Module, optimizer: Any, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimiser step; the weighted losses by name, means over its images on all processes."""
        accelerator, count = self.context.accelerator, len(micro_batches)
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(micro_batches):
            x = batch.x.to(accelerator.device)
            y = None if batch.y is None else batch.y.to(accelerator.device)
            last = i + 1 == count
            with contextlib.nullcontext() if last else accelerator.no_sync(objective):
                with accelerator.autocast():
                    teacher = self.cached_teacher(x, batch.index) if self.cached_teacher else self.teacher(x)
                losses = objective(x, y, teacher)
                accelerator.backward(torch.stack(list(losses.values())).sum() / count)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / count
        means = accelerator.reduce(torch.stack([v.float() for v in sums.values()]), "mean").tolist()
        result = dict(zip(sums, means, strict=True))
        if _finite(result):
            if self.stage.optimiser.clip_grad is not None:
                accelerator.clip_grad_norm_(self.student.parameters(), self.stage.optimiser.clip_grad)
            optimizer.step()
            if self.plan.unfolds and self.plan.folds_again and self.stage.moves_predictors:
                retract(self.student)
            if self.ema is not None:
                self.ema.update(self.student)
        optimizer.zero_grad()
        return result

    def _report(self, losses: dict[str, float], images_per_s: float, epoch: float) -> None:
        """A row of the log, and the progress bar."""
        lr, loss = self.optimizer.param_groups[0]["lr"], sum(losses.values())
        if self.context.log is not None:
            row = {"step": self.status.done, "stage": self.number, "epoch": epoch, "lr": lr, "loss": loss}
            self.context.log.write_step({**row, **losses, "images_per_s": images_per_s})
        label = f"{self.stage.name} {self.number + 1}/{len(self.plan.stages)}"
        note = training_note(loss, lr, images_per_s)
        self.context.options.listener.progress(label, self.status.step, self.planned.steps, note)

    def _save_or_stop(self) -> None:
        accelerator, options = self.context.accelerator, self.context.options
        stop = self.context.interrupts.requested
        if accelerator.num_processes > 1:
            flag = torch.tensor([float(stop)], device=accelerator.device)
            stop = bool(accelerator.reduce(flag, "sum").item())
        due = time.monotonic() - self.status.saved_at >= 60 * options.save_minutes
        if (stop or due) and processes.main():
            self._save()
        if stop:
            processes.barrier()  # a launcher ends all processes where one has ended: the state is on the disk first
            done = f"{self.status.done} of {sum(planned.steps for planned in self.plan.stages)} steps"
            advice = f"the same command with {field('resume')} goes on"
            raise interrupted(f"interrupted after {done}; the state is saved in {options.folder}: {advice}")

    def _save(self) -> None:
        """Saves the state; rows of the log first, so that no saved step lacks its row."""
        status = self.status
        if self.context.log is not None:
            self.context.log.flush()
        optimiser, values = saved_state.pack(self.optimizer)
        tensors = prefixed("student", self.student.state_dict()) | prefixed("optimiser", optimiser)
        if self.ema is not None:
            tensors |= prefixed("ema", self.ema.module.state_dict())
        tensors |= prefixed("best", status.best_weights or {})
        facts = {"identity": self.plan.identity, "stage": self.number, "step": status.step, "done": status.done}
        facts |= {"optimiser": values, "start": asdict(status.start), "best": asdict(status.best)}
        saved_state.save(RunFolder(self.context.options.folder).state, SavedState(tensors, facts))
        status.saved_at = time.monotonic()


def interrupted(message: str) -> Interrupted:
    """The error that ends the run in all processes, of which one prints it (`processes.agreed`)."""
    error = Interrupted(message)
    vars(error)["agreed"] = True
    return error


def _finite(losses: dict[str, float]) -> bool:
    return all(map(math.isfinite, losses.values()))


@contextlib.contextmanager
def _random_numbers(seed: int, stage: int, step: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's random numbers (stochastic depth) depend on seed, stage, step and process alone."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(drawn_number(seed, "step", stage, step, processes.rank()) >> 1)
        yield


def training_note(loss: float, lr: float, images_per_s: float) -> str:
    """The text beside the progress bar: 'loss 0.134  lr 1.9e-04  11.3 images/s'."""
    return f"loss {loss:#.3g}  lr {lr:.1e}  {images_per_s:.1f} images/s"
