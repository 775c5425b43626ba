"""Errors for the user, in one line: what was wrong, what was expected, what to do next."""

from __future__ import annotations

import re
import reprlib

_OPEN, _CLOSE = "\ue000", "\ue001"  # of Unicode's private use area: no message has them otherwise
_FIELD = re.compile(f"{_OPEN}([a-z0-9_]+){_CLOSE}")


def field(name: str) -> str:
    """The name of an argument, marked, for a message: shown as `num_classes` in Python, `--num-classes` at the terminal.

    Whoever shows the message chooses (`as_arguments`, `as_options`).
    """
    return f"{_OPEN}{name}{_CLOSE}"


def as_arguments(text: str) -> str:
    """A message for Python, `printable`: fields by the names of their arguments."""
    return printable(_FIELD.sub(r"\1", text))


def as_options(text: str) -> str:
    """A message for the command line, `printable`: fields by their options."""
    return printable(_FIELD.sub(lambda match: "--" + match[1].replace("_", "-"), text))


def printable(text: str, keep: str = "") -> str:
    """`text` with characters that steer a terminal or cannot be seen as escapes (ESC: \\x1b), but for those of `keep`.

    File names, options and the headers of files may hold any character.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def brief(value: object) -> str:
    """`repr(value)`, at most about 100 characters of it, however large the value is."""
    return _Brief().repr(value)


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        """See `reprlib.Repr`, which fails from 4300 digits on."""
        return repr(x) if x.bit_length() < 200 else f"a number of about {round(x.bit_length() * 0.30103)} digits"


class SparsifyError(Exception):
    """A file, data set or model that cannot be used as asked (exit code 1)."""

    exit_code = 1

    def __str__(self) -> str:
        return short(as_arguments(super().__str__()))

    def for_command_line(self) -> str:
        """The message that names options instead of arguments."""
        return short(as_options(super().__str__()))


class UsageError(SparsifyError):
    """An option, argument or name that cannot be understood (exit code 2)."""

    exit_code = 2


class UnsupportedModel(SparsifyError):
    """A model whose attention is not supported; nothing has been computed (exit code 1)."""


class BadFile(SparsifyError):
    """A file that is missing, damaged, foreign or from a newer version (exit code 1)."""


class BadData(SparsifyError):
    """A folder or data set that holds no usable images or labels (exit code 1)."""


class BadLabels(BadData):
    """Images whose labels are missing or are not the model's; without labels they could be used (exit code 1)."""


class Interrupted(SparsifyError):
    """Long work that was asked to stop and has saved its state (exit code 130)."""

    exit_code = 130


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of `error` on one line of at most `limit` characters; its class name where it has none."""
    marked = error.args[0] if isinstance(error, SparsifyError) and error.args else error  # fields stay marked
    text = " ".join(str(marked).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def short(text: str, limit: int = 1000) -> str:
    """`text` without its middle where it is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
