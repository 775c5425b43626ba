"""Locks: outputs that are held while long work makes them (a file `.NAME.lock`), and folders for what is being written.

Both are gone afterwards. What a killed process left of them holds no lock any more, and the next write removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsify.errors import BadFile, field
from sparsify.files.destinations import check_file

SCRATCH = ".sparsify-"  # beginning of the names of folders for what is being written


@contextmanager
def scratch(folder: str | Path) -> Iterator[Path]:
    """A new folder in `folder`, removed after the block; first those that killed processes of this user left there.

    A living process holds a lock in its own, which ends with it: process numbers, which repeat, say nothing.
    """
    from filelock import FileLock

    while True:
        made = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
        lock = FileLock(made / "lock")
        try:
            lock.acquire()
        except FileNotFoundError:  # taken for a killed one's before it was locked
            continue
        except OSError:  # a file system without locks: nobody removes it
            pass
        break
    try:
        for other in Path(folder).glob(f"{SCRATCH}*"):
            with contextlib.suppress(OSError):  # `Timeout`: its process lives
                info = other.lstat()
                if stat.S_ISDIR(info.st_mode) and info.st_uid == made.stat().st_uid:
                    with FileLock(other / "lock", timeout=0):
                        shutil.rmtree(other, ignore_errors=True)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        lock.release()


@contextmanager
def reserved(*paths: str | Path | None) -> Iterator[None]:
    """Holds outputs while long work makes them, so that it does not fail at its end; None: no output.

    Raises:
        BadFile: an output that cannot be written (`check_file`), or that another process is making.
    """
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as held:
        for path in paths:
            if path is None:
                continue
            target = check_file(path)
            if target.straight:
                continue
            name = os.path.join(target.folder, f".{os.path.basename(target.path)}.lock")
            lock = FileLock(name, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                advice = f"wait until it is done, or choose another {field('output')}"
                raise BadFile(f"another process is making {path}: {advice}") from None
            except OSError:  # a file system without locks
                Path(name).unlink(missing_ok=True)
                continue
            held.callback(lock.release)
            held.callback(Path(name).unlink, missing_ok=True)  # before it is released
        yield
