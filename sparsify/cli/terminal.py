"""What the two output streams can take: characters, width, a bar, and a reader that has gone.

Results go to stdout; what is said on the way, progress and errors go to stderr.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 10_000  # columns of what goes into a pipe or a file: nothing is wrapped or cut there
PLAIN = {
    "–": "-",
    "—": "-",
    "…": "...",
    "→": "->",
    "×": "x",
    "±": "+-",
    "·": "-",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
}
NARROW = 80  # columns that every table fits
_HANDLER = "sparsify.plain"
_DECIDED = ("ignore", "replace", "namereplace", "xmlcharrefreplace")  # by PYTHONIOENCODING: left as they are


class ReaderGone(Exception):
    """Whoever read the output has stopped reading: `sparsify models | head -1`."""


def prepare() -> None:
    """Let stdout and stderr degrade the characters that their encoding does not have, instead of failing."""
    codecs.register_error(_HANDLER, _degrade)
    for stream in (sys.stdout, sys.stderr):
        errors = getattr(stream, "errors", None)
        if errors is not None and errors not in _DECIDED and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def _degrade(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(char, "?") for char in error.object[error.start : error.end]), error.end


def console(*, stderr: bool = False) -> Console:
    """A console of rich: as wide as the terminal, or as COLUMNS says; `WIDE` in a pipe or a file.

    Results are never set narrower than `NARROW`: in a smaller window lines run over, and no figure loses its unit.

    Rich itself leaves colour out where there is no terminal, NO_COLOR is set or TERM is dumb, and FORCE_COLOR asks for it.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    wide = not stream.isatty() and "COLUMNS" not in os.environ
    made = Console(stderr=stderr, width=WIDE if wide else None)
    if not stderr and made.width < NARROW:
        made.width = NARROW
    return made


def animates(where: Console) -> bool:
    """Whether a bar can be drawn there: a real terminal, whatever FORCE_COLOR says of colour, that can move its cursor."""
    return where.file.isatty() and not where.is_dumb_terminal


@contextlib.contextmanager
def read_to_the_end() -> Iterator[None]:
    """Write out what is printed inside.

    Raises:
        ReaderGone: nobody reads it any more; stdout leads nowhere from then on, so that Python's exit is quiet too.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderGone from None
