"""Files written whole or not at all. While one is written, a folder `.sparsify-*` lies beside it (`locks.scratch`)."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparsify.errors import BadFile, one_line
from sparsify.files.destinations import Destination
from sparsify.files.locks import scratch
from sparsify.files.plain_json import to_json


@contextmanager
def whole(path: str | Path) -> Iterator[str]:
    """A temporary file to write to; what it holds becomes the file `path` when the block ends without error.

    A crash, Ctrl-C or a full disk leaves the old file, if any, unchanged. A symbolic link stays one, and its target is
    replaced; mode and owner of an existing file are kept. Devices, pipes and open files (/dev/null, /dev/stdout, /dev/fd/3)
    are written to and not replaced.

    Raises:
        BadFile: the folder is missing, or cannot be written.
        BrokenPipeError: whoever read the pipe has gone.
    """
    try:
        target = Destination.of(path)
        with scratch(target.folder) as folder:
            temporary = folder / "file"
            temporary.touch()
            mode = temporary.stat().st_mode & 0o777  # what the umask leaves
            yield str(temporary)
            if target.straight:
                with open(temporary, "rb") as content, target.stream() as stream:
                    shutil.copyfileobj(content, stream)
                return
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if target.info is not None:
                mode = stat.S_IMODE(target.info.st_mode)
                with contextlib.suppress(PermissionError, AttributeError):  # another user's file; Windows
                    os.chown(temporary, target.info.st_uid, target.info.st_gid)
            os.chmod(temporary, mode)  # safetensors writes with 0600
            os.replace(temporary, target.path)
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        raise BadFile(f"cannot write {path}: {one_line(error)}; the old file, if any, is unchanged") from error


def write_json(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write a report as JSON with all digits, whole or not at all (`whole`)."""
    write_all({Path(path): tree})


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all (`whole`)."""
    write_all({Path(path): text})


def write_all(contents: Mapping[Path, Mapping[str, Any] | str | bytes]) -> None:
    """Write several files, mappings as JSON, text as UTF-8: where one of them cannot be written, none is (`whole`)."""
    with contextlib.ExitStack() as files:
        for path, content in contents.items():
            if isinstance(content, Mapping):
                content = to_json(content, indent=2) + "\n"
            data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
            Path(files.enter_context(whole(path))).write_bytes(data)
