"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparsify.errors import BadFile, one_line


@contextmanager
def whole(path: str | Path) -> Iterator[str]:
    """A temporary name beside `path` to write to; it takes the place of `path` when the block ends without error.

    A crash, Ctrl-C or a full disk leaves the old file, if any, as it was.

    Raises:
        BadFile: the folder is missing, or cannot be written.
    """
    path, temporary = Path(path), ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp gives 0600
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise BadFile(f"cannot write {path}: {one_line(error)}; the old file, if any, is unchanged") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
