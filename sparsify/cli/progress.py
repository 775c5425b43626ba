"""Progress of commands on stderr: bars at a terminal, lines elsewhere, nothing where `quiet`."""

from __future__ import annotations

from sparsify import progress
from sparsify.cli import terminal


class Reporter(progress.Reporter):
    """`sparsify.progress.Reporter` on this command's stderr."""

    def __init__(self, quiet: bool = False, unit: str = "images") -> None:
        console = None if quiet else terminal.console(stderr=True)
        shows_bars = console is not None and terminal.animates(console)
        super().__init__(console if shows_bars else None, None if quiet else terminal.note, unit)
