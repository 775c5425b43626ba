"""The error line on a command's stderr."""

from __future__ import annotations


def the_error(err: str) -> str:
    """The last line, which is the one error; only notes stand before it."""
    *notes, error = err.splitlines()
    assert error.startswith("error: ") and not any(line.startswith(("error", "Traceback", " ")) for line in notes), err
    return error
