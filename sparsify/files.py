"""Files: written whole or not at all, JSON, and names of data and models fit to be published."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparsify.errors import BadFile, one_line


@contextmanager
def whole(path: str | Path) -> Iterator[str]:
    """A temporary file beside `path` to write to; it replaces `path` when the block ends without error.

    A crash, Ctrl-C or a full disk leaves the old file, if any, unchanged.

    Raises:
        BadFile: the folder is missing, or cannot be written.
    """
    path = Path(path)
    temporary = os.path.join(path.parent, f".{path.name}.{secrets.token_hex(4)}")
    try:
        open(temporary, "xb").close()
        mode = os.stat(temporary).st_mode & 0o777  # what the umask leaves
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # safetensors writes with 0600
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise BadFile(f"cannot write {path}: {one_line(error)}; the old file, if any, is unchanged") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def publishable(name: str, parts: int = 2) -> str:
    """The name of a data set or model as a file may tell it: of a path the last `parts` parts.

    '/home/me/photos/val' -> 'photos/val'
    """
    known = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    return "/".join(known[-parts:]) or name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a command wrote; `BadFile`: missing, not JSON, or JSON of another type."""
    if not path.exists():
        raise BadFile(f"no file {path}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read as JSON: {one_line(error, 100)}") from None
    if not isinstance(tree, dict):
        raise BadFile(f"{path} holds no results: an object of JSON is expected")
    return tree


def write_json(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write a report as JSON with all digits; see `write_text`."""
    write_text(path, json.dumps(tree, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all (`whole`)."""
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
