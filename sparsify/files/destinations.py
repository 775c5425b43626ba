"""What a write to a path reaches (a file, through links; a device, a pipe, an open file), and whether it can be written."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import IO, NamedTuple

from sparsify.errors import BadFile, one_line


class Destination(NamedTuple):
    """What a write to a path reaches."""

    path: str  # links followed
    info: os.stat_result | None  # of the file that lies there
    straight: bool  # a device, pipe or open file: written to, not replaced

    @classmethod
    def of(cls, path: str | Path) -> Destination:
        """Of `path`; raises OSError where that cannot be written."""
        info = None
        with contextlib.suppress(FileNotFoundError):
            info = os.stat(path)
        if info is not None and stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError("it is a folder")
        if _descriptor(path) is not None or (info is not None and not stat.S_ISREG(info.st_mode)):
            return cls(str(path), info, True)
        target = cls(os.path.realpath(path), info, False)
        _check_writable(target.folder)
        return target

    @property
    def folder(self) -> str:
        """Where the content is collected."""
        return tempfile.gettempdir() if self.straight else os.path.dirname(self.path)

    def stream(self) -> IO[bytes]:
        """Into a device or pipe; an open file goes on where it stands."""
        number = _descriptor(self.path)
        if number is None:
            return open(self.path, "wb")
        print(end="", flush=True)  # what was printed comes first
        return open(os.dup(number), "wb")


def check_file(path: str | Path) -> Destination:
    """What a write to `path` reaches; `BadFile`: a folder lies there, or its own is missing or cannot be written."""
    try:
        return Destination.of(path)
    except OSError as error:
        raise BadFile(f"cannot write {path}: {one_line(error)}") from None


def check_folder(path: Path) -> None:
    """Raise `BadFile` where `path` is no folder that can be written, and none that can be made."""
    try:
        if path.is_dir():
            _check_writable(path)
        elif path.exists():
            raise NotADirectoryError("it is a file, a folder is expected")
        else:
            Destination.of(path)
    except OSError as error:
        raise BadFile(f"cannot write to {path}: {one_line(error)}") from None


def _check_writable(folder: str | Path) -> None:
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {folder} cannot be written")


def _descriptor(path: str | Path) -> int | None:
    """The descriptor of this process that `path` names, as /dev/stdout and /dev/fd/3 do."""
    where = os.path.abspath(path)
    while True:
        folder, name = os.path.split(where)
        folder = os.path.realpath(folder)
        if name.isdecimal() and folder in (f"/proc/{os.getpid()}/fd", "/dev/fd"):
            return int(name)
        if not os.path.islink(where):
            return None
        where = os.path.join(folder, os.readlink(where))
