"""Progress of long work: a bar with rate and time left at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from sparsify.cli import terminal

EVERY = 10.0  # seconds between plain lines
EVERY_NOTE = 30.0  # of training, which goes on for hours
WINDOW = 300.0  # seconds over which the time left is estimated: a training step may take many of them
BAR = 40  # maximum columns of a bar


def clock(seconds: float) -> str:
    """4:12, or 1:04:12 from an hour on; 0:04 for four seconds."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class _Step:
    """A step that is reported in lines."""

    began: float  # time of its first report
    first: int  # count at its first report
    printed: float  # time of its last line
    done: int = -1  # count at its last line

    def left(self, now: float, done: int, total: int | None) -> str:
        """'4:12 left', by the mean rate so far; '' if that is unknown."""
        if total is None or not self.first < done < total:
            return ""
        return f"{clock((total - done) * (now - self.began) / (done - self.first))} left"


class _TimeLeft(TimeRemainingColumn):
    """'4:12 left'; nothing for a task that is done or whose rate is unknown."""

    def render(self, task: Task) -> Text:
        """See the class."""
        left = None if task.finished else task.time_remaining
        return Text("" if left is None else f"{clock(left)} left", style="progress.remaining")


class Reporter:
    """Use as a context manager; `update(step, done, total)` may be called for every batch (`quiet`: shows nothing)."""

    def __init__(self, quiet: bool = False, unit: str = "images") -> None:
        self.quiet, self.unit = quiet, unit
        self.console = terminal.console(stderr=True)
        self.bar: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.lines: dict[str, _Step] = {}

    def __enter__(self) -> Reporter:
        if not self.quiet and terminal.animates(self.console):
            words = Column(no_wrap=True)
            self.bar = Progress(
                TextColumn("{task.description:>10}", markup=False, table_column=words),
                BarColumn(None, table_column=Column(max_width=BAR)),  # this column shrinks in a narrow window
                MofNCompleteColumn(table_column=words),
                TextColumn("{task.fields[note]}", markup=False, table_column=words),
                _TimeLeft(table_column=words),
                console=self.console,
                transient=True,
                speed_estimate_period=WINDOW,
                redirect_stdout=sys.stdout.isatty(),  # lines that go to a file are left alone
            )
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: str, done: int, total: int | None, note: str = "") -> None:
        """Shows `done` of `total` (None: unknown) for `step`, which starts again when `done` decreases.

        `note` replaces the rate. Without a terminal a line is printed every `EVERY` seconds; for a step with notes every
        `EVERY_NOTE` seconds and at its end.
        """
        if self.quiet:
            return
        if self.bar is None:
            self._line(step, done, total, note)
            return
        if step not in self.tasks:
            self.tasks[step] = self.bar.add_task(step, total=total, note="")
        task = self.bar.tasks[self.tasks[step]]
        if done < task.completed:
            self.bar.reset(task.id, note="")
        if not note and task.elapsed and done:
            note = f"{done / task.elapsed:.1f} {self.unit}/s"
        self.bar.update(task.id, completed=done, total=total, note=note)

    def _line(self, step: str, done: int, total: int | None, note: str) -> None:
        now = time.monotonic()
        last = self.lines.get(step)
        if last is None or done < last.done:
            last = self.lines[step] = _Step(began=now, first=done, printed=now)
        due = now - last.printed >= (EVERY_NOTE if note else EVERY)
        ends = bool(note) and total is not None and done >= total
        if done == last.done or not (due or ends):
            return
        last.printed, last.done = now, done
        count = f"{step}: {done}{f'/{total}' if total else ''}"
        parts = [count, note, last.left(now, done, total)] if note else [f"{count} {self.unit}"]
        terminal.note("  ".join(part for part in parts if part))
