"""The two output streams: what is printed, what they support (characters, width, bars), and a reader that has gone.

Results go to stdout; notes, progress and errors go to stderr. All of it passes here (`line`, `lines`, `note`, `console`):
control characters of file names, options and headers become visible escapes (`sparsify.errors.printable`).
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparsify.errors import SparsifyError, one_line, printable

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 10_000  # columns of a pipe or a file, where nothing is wrapped or cut
PLAIN = dict(zip("–—·…→×±’‘“”", ["-", "-", "-", "...", "->", "x", "+-", "'", "'", '"', '"'], strict=True))
NARROW = 80  # columns that every table fits
_HANDLER = "sparsify.plain"
_DECIDED = ("ignore", "replace", "namereplace", "xmlcharrefreplace")  # by PYTHONIOENCODING: left as they are


class ReaderGone(Exception):
    """The reader of the output has stopped reading: `sparsify models | head -1`."""


def line(text: str) -> None:
    """Print a line of the result."""
    print(printable(text))


def lines(text: str) -> None:
    """Print a text of several lines, the last of which has its end."""
    print(printable(text, keep="\n\t"), end="")


def note(text: str) -> None:
    """Print a line for the person at the terminal at once."""
    print(printable(text), file=sys.stderr, flush=True)


def prepare() -> None:
    """Makes stdout and stderr replace characters that their encoding does not have, and write to nowhere where closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # >&-: this also keeps files from getting the number of the stream
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
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
    """A console of rich, as wide as the terminal or COLUMNS; `WIDE` in a pipe or a file.

    Results are never narrower than `NARROW`: in a smaller window lines run over, so that no figure loses its unit. Rich
    itself heeds NO_COLOR, FORCE_COLOR, TERM=dumb and the absence of a terminal.
    """
    from rich.console import Console
    from rich.segment import Segment

    class Escaping(Console):
        def render(self, *what: Any) -> Iterator[Segment]:
            for part in super().render(*what):
                yield part if part.control else Segment(printable(part.text, keep="\n"), part.style)

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with code 1

    stream = sys.stderr if stderr else sys.stdout
    wide = not stream.isatty() and "COLUMNS" not in os.environ
    made = Escaping(stderr=stderr, width=WIDE if wide else None)
    if not stderr and made.width < NARROW:
        made.width = NARROW
    return made


def animates(where: Console) -> bool:
    """Whether a bar can be drawn: a real terminal (whatever FORCE_COLOR says) that can move its cursor."""
    return where.file.isatty() and not where.is_dumb_terminal


@contextlib.contextmanager
def read_to_the_end() -> Iterator[None]:
    """Flushes what is printed inside the block.

    Raises:
        ReaderGone: nobody reads it any more; stdout is then redirected to nowhere, so that Python exits quietly too.
        SparsifyError: it cannot be written, for example to a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        gone = isinstance(error, BrokenPipeError)
        if not gone and _flushes():  # the error is of another file
            raise
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if gone:
            raise ReaderGone from None
        raise SparsifyError(f"standard output cannot be written: {one_line(error)}") from None


def _flushes() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True
