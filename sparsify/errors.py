"""Errors meant for the person at the terminal: one line, what was wrong, what was expected, what to do."""


class SparsifyError(Exception):
    """A file, data set or model that cannot be used as asked (exit code 1)."""

    exit_code = 1


class UsageError(SparsifyError):
    """An option, argument or name that cannot be understood (exit code 2)."""

    exit_code = 2


class UnsupportedModel(SparsifyError):
    """A model whose attention is not understood; nothing has been computed (exit code 1)."""


class BadFile(SparsifyError):
    """A file that is missing, damaged, foreign or from a newer version (exit code 1)."""


class BadData(SparsifyError):
    """A folder or data set that holds no usable images or labels (exit code 1)."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of `error` on one line of at most `limit` characters; its class name where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Interrupted(SparsifyError):
    """Long work that was asked to stop and has saved where it stands (exit code 130)."""

    exit_code = 130
