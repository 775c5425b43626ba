"""The loop of one stage: steps, validations, saved states. The same code on one CPU and on many GPUs."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparsify import processes
from sparsify.errors import Interrupted
from sparsify.fit.finetune import saved_state, trainable
from sparsify.fit.finetune.batches import Batch
from sparsify.fit.finetune.interrupts import Interrupts
from sparsify.fit.finetune.log import Record
from sparsify.fit.finetune.objective import Forward, Lesson, Teacher
from sparsify.fit.finetune.plan import Plan, Planned
from sparsify.fit.finetune.run_status import How, Standing
from sparsify.fit.finetune.teacher_cache import Cached
from sparsify.fit.finetune.validation import Judge
from sparsify.images.loaders import drawn_number
from sparsify.nn.folding import retract

STATE = "state.safetensors"


class StageRun:
    """One stage of one run."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, plan: Plan, number: int, accelerator: Accelerator, judge: Judge,
        how: How, standing: Standing, record: Record | None, interrupts: Interrupts,
    ) -> None:  # fmt: skip
        self.student, self.plan, self.number, self.accelerator = student, plan, number, accelerator
        self.judge, self.how, self.standing, self.record, self.interrupts = judge, how, standing, record, interrupts
        self.planned: Planned = plan.stages[number]
        self.stage = self.planned.stage
        trainable.trainable(student, self.stage)
        trainable.set_drop_path(student, self.stage.drop_path)
        cast(Any, student).set_grad_checkpointing(self.stage.grad_checkpointing)
        moved = plan.repair is not None or any(p.stage.moves_backbone for p in plan.stages[: number + 1])
        pairs = self.stage.losses.pairs and self.stage.losses.attention_target == "teacher" and (
            moved or self.stage.attention != "dense"
        )  # fmt: skip
        self.teacher, self.cached = Teacher(teacher, self.stage.losses, pairs), cast(Cached | None, None)
        self.optimizer = trainable.optimiser(student, self.stage)
        self.schedule: Scheduler = trainable.schedule(
            self.optimizer, self.stage, self.planned.steps, self.planned.batches.steps_per_epoch or self.planned.steps
        )
        self.ema = ModelEmaV3(student, decay=self.stage.ema) if self.stage.ema else None
        self.keeps = trainable.Keeps(student, self.stage, self.planned.steps)

    def run(self, resume: saved_state.State | None) -> str:
        """Steps until the stage ends; returns why it stopped before, or ''."""
        first = self.standing.step
        if resume is not None:
            saved_state.unpack(self.optimizer, resume.part("optimiser"), resume.facts["optimiser"])
            if self.ema is not None:
                self.ema.module.load_state_dict(resume.part("ema"))
        if first >= self.planned.steps:
            return ""
        if self.stage.cache_teacher:
            self.cached = Cached(self.teacher, self.planned.images, self.how.folder / f"teacher-{self.number}")
        lesson, optimizer = self.accelerator.prepare(Lesson(self.student, self.stage), self.optimizer)
        steps, batches = self.planned.steps, self.planned.batches.from_step(first)
        per_epoch = self.planned.batches.steps_per_epoch or steps
        clock, seen = time.monotonic(), 0
        for step in range(first, steps):
            self.keeps.at(step)
            self.schedule.step_update(step)
            with _drawn(self.plan.seed, self.number, step, self.accelerator.device):
                self.student.train()
                parts = self._step(lesson, optimizer, next(batches))
            if not _finite(parts):
                self.keeps.reset()
                return self._stop(step)
            self.standing.step, self.standing.done = step + 1, self.standing.done + 1
            seen += self.stage.batch_size
            rate = seen / max(1e-9, time.monotonic() - clock)
            self._tell(step + 1, parts, rate, (step + 1) / per_epoch)
            every = per_epoch * self.planned.validate_every
            if step + 1 == steps or (every and (step + 1) % every == 0):
                self._validate((step + 1) / per_epoch)
            self._save_or_stop()
        self.keeps.reset()
        return ""

    def _step(self, lesson: Forward, optimizer: Any, micros: list[Batch]) -> dict[str, float]:
        """One optimiser step; the weighted losses by name, means over its images on all processes."""
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(micros):
            x = batch.x.to(self.accelerator.device)
            y = None if batch.y is None else batch.y.to(self.accelerator.device)
            last = i + 1 == len(micros)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(cast(nn.Module, lesson)):
                with self.accelerator.autocast():
                    said = self.teacher(x) if self.cached is None else self.cached(x, batch.index)
                parts = lesson(x, y, said)
                self.accelerator.backward(torch.stack(list(parts.values())).sum() / len(micros))
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(micros)
        found = self.accelerator.reduce(torch.stack([v.float() for v in sums.values()]), "mean").tolist()
        parts_found = dict(zip(sums, found, strict=True))
        if _finite(parts_found):
            if self.stage.optimiser.clip_grad is not None:
                self.accelerator.clip_grad_norm_(self.student.parameters(), self.stage.optimiser.clip_grad)
            optimizer.step()
            if self.plan.unfolds and self.plan.folds_again and self.stage.moves_predictors:
                retract(self.student)
            if self.ema is not None:
                self.ema.update(self.student)
        optimizer.zero_grad()
        return parts_found

    def _tell(self, step: int, parts: dict[str, float], rate: float, epoch: float) -> None:
        lr, loss = self.optimizer.param_groups[0]["lr"], sum(parts.values())
        if self.record is not None:
            row = {"step": self.standing.done, "stage": self.number, "epoch": epoch, "lr": lr, "loss": loss}
            self.record.step({**row, **parts, "images_per_s": rate})
        label = f"{self.stage.name} {self.number + 1}/{len(self.plan.stages)}"
        self.how.progress(label, step, self.planned.steps, training_note(loss, lr, rate))

    def _validate(self, epoch: float) -> None:
        """Scores the weights (their running mean, where there is one) and remembers the best."""
        model, kind = (self.student, "current") if self.ema is None else (self.ema.module, "ema")
        if self.ema is None:
            self.keeps.reset()
        self.standing.compare(model, self.judge, self.record, self.how, epoch, kind)

    def _save_or_stop(self) -> None:
        stop = self.interrupts.asked
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([float(stop)], device=self.accelerator.device)
            stop = bool(self.accelerator.reduce(flag, "sum").item())
        late = time.monotonic() - self.standing.saved_at >= 60 * self.how.save_minutes
        if (stop or late) and processes.main():
            self._save()
        if stop:
            processes.barrier()  # a launcher ends all where one has ended: the state is on the disk first
            stopped = Interrupted(
                f"interrupted after {self.standing.done} of {self.plan.steps} steps; the state is saved in "
                f"{self.how.folder}: the same command with --resume goes on"
            )
            vars(stopped)["agreed"] = True  # all processes raise it, one says it
            raise stopped

    def _save(self) -> None:
        """The state on disk, and the record's rows before it, so that no saved step lacks its row."""
        s = self.standing
        if self.record is not None:
            self.record.flush()
        moments, values = saved_state.pack(self.optimizer)
        tensors = saved_state.prefixed("student", self.student.state_dict()) | saved_state.prefixed(
            "optimiser", moments
        )
        if self.ema is not None:
            tensors |= saved_state.prefixed("ema", self.ema.module.state_dict())
        if s.best_weights is not None:
            tensors |= saved_state.prefixed("best", s.best_weights)
        facts = {
            "identity": self.plan.identity, "stage": self.number, "step": s.step, "done": s.done, "optimiser": values,
            "start": s.start.as_dict(), "best": s.best.as_dict(),
        }  # fmt: skip
        saved_state.save(self.how.folder / STATE, saved_state.State(tensors, facts))
        s.saved_at = time.monotonic()

    def _stop(self, step: int) -> str:
        return (
            f"stage '{self.stage.name}' stopped at step {step + 1}: its loss is not finite (lower optimiser.lr, or set "
            "optimiser.clip_grad)"
        )


def _finite(parts: dict[str, float]) -> bool:
    return all(map(math.isfinite, parts.values()))


@contextlib.contextmanager
def _drawn(seed: int, stage: int, step: int, device: torch.device) -> Iterator[None]:
    """What a step draws (stochastic depth) depends on seed, stage, step and process alone."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(drawn_number(seed, "step", stage, step, processes.rank()) >> 1)
        yield


def training_note(loss: float, lr: float, images_per_s: float) -> str:
    """What stands beside a bar of training: 'loss 0.134  lr 1.9e-04  11.3 images/s'."""
    return f"loss {loss:#.3g}  lr {lr:.1e}  {images_per_s:.1f} images/s"
