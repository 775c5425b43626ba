"""Progress of long work: a bar with rate and time left at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between plain lines


class Reporter:
    """Use as a context manager; `update(step, done, total)` may be called for every batch.

    Args:
        quiet: show nothing.
        unit: what is counted.
    """

    def __init__(self, quiet: bool = False, unit: str = "images") -> None:
        self.quiet, self.unit = quiet, unit
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.said: dict[str, float] = {}

    def __enter__(self) -> Reporter:
        if not self.quiet and self.console.is_terminal:
            rate = TextColumn("{task.fields[rate]}")
            columns = (
                TextColumn("{task.description:>10}"),
                BarColumn(),
                MofNCompleteColumn(),
                rate,
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: str, done: int, total: int | None) -> None:
        """`done` of `total` (None: unknown) in `step`."""
        if self.quiet:
            return
        now = time.monotonic()
        if self.bar is None:
            if now - self.said.setdefault(step, now) >= EVERY:
                self.said[step] = now
                print(f"{step}: {done}{f'/{total}' if total else ''} {self.unit}", file=sys.stderr, flush=True)
            return
        if step not in self.tasks:
            self.tasks[step] = self.bar.add_task(step, total=total, rate="")
        task = self.bar.tasks[self.tasks[step]]
        rate = f"{done / task.elapsed:.1f} {self.unit}/s" if task.elapsed and done else ""
        self.bar.update(self.tasks[step], completed=done, total=total, rate=rate)
