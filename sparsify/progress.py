"""Progress of long work: a bar with rate and time left at a terminal or in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

EVERY = 10.0  # seconds between plain lines
EVERY_NOTE = 30.0  # of training, which goes on for hours
WINDOW = 300.0  # seconds over which the time left is estimated: a training step may take many of them
UNITS = {"MACs": "models", "search": "schedules"}  # of steps that count no images
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
    """Use as a context manager; `update(step, done, total)` may be called for every batch.

    Args:
        console: where bars are drawn; None: nowhere.
        note: takes the lines where there are no bars; None: nothing is shown then.
        unit: what is counted.
    """

    def __init__(self, console: Console | None, note: Callable[[str], None] | None, unit: str = "images") -> None:
        self.console, self.note, self.unit = console, note, unit
        self.bar: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.lines: dict[str, _Step] = {}

    def __enter__(self) -> Reporter:
        if self.console is not None:
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
        if self.bar is None:
            if self.note is not None:
                self._line(self.note, step, done, total, note)
            return
        if step not in self.tasks:
            self.tasks[step] = self.bar.add_task(step, total=total, note="")
        task = self.bar.tasks[self.tasks[step]]
        if done < task.completed:
            self.bar.reset(task.id, note="")
        if not note and task.elapsed and done:
            note = f"{done / task.elapsed:.1f} {UNITS.get(step, self.unit)}/s"
        self.bar.update(task.id, completed=done, total=total, note=note)

    def _line(self, say: Callable[[str], None], step: str, done: int, total: int | None, note: str) -> None:
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
        parts = [count, note, last.left(now, done, total)] if note else [f"{count} {UNITS.get(step, self.unit)}"]
        say("  ".join(part for part in parts if part))


def here() -> Reporter:
    """For the caller of a library function: bars on stderr of a terminal or in a notebook, else lines on stderr."""
    console = Console(stderr=True)
    shows_bars = console.is_jupyter or (console.file.isatty() and not console.is_dumb_terminal)
    return Reporter(console if shows_bars else None, lambda line: print(line, file=sys.stderr, flush=True))
