"""Image files of a folder tree or of a .tar: regular files, each once, in the natural order of their names.

What is hidden (its name begins with a dot) is passed over; what else is left out is counted.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from timm.utils.misc import natural_key

from sparsify.errors import BadData, one_line

IMAGES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
OTHERS = (".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".pgm", ".tga")  # pictures that are not read, but counted
LARGEST = 2**30  # bytes of an image in an archive, which is read whole
_NO_FILES = "pipes, sockets or devices"


class Files:
    """Images by index with their labels (-1: none); `names` are below the folder that was asked for."""

    def __init__(self, root: str, at: str, names: list[str], left: Counter[str], spans: Sequence[tuple[int, int]] = ()):
        self.root, self.at, self.names, self.left = root, at, names, left
        self.spans = spans  # where each lies in the archive `root`: first byte, bytes; none in a folder
        self.labels: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.names)

    def fetch(self, index: int) -> tuple[Any, int]:
        label = self.labels[index] if self.labels else -1
        if not self.spans:
            return os.path.join(self.root, self.at, self.names[index]), label
        start, size = self.spans[index]
        with open(self.root, "rb") as file:
            if start + size > os.fstat(file.fileno()).st_size:
                raise ValueError("the archive is cut short")
            if size > LARGEST:
                raise ValueError(f"{size:,} bytes, at most {LARGEST:,} are read")
            file.seek(start)
            return io.BytesIO(file.read(size)), label

    def name(self, index: int) -> str:
        """Below the data set's folder, or in the archive."""
        return joined(self.at, self.names[index]) if self.spans else self.names[index]

    def path(self, index: int) -> str:
        """What it is, however the data set was named: real path of the folder or archive, and place in it."""
        return os.path.join(os.path.realpath(self.root), self.at, self.names[index])

    @property
    def place(self) -> str:
        """The folder as a path; of an archive the folder in it stands behind."""
        return os.path.join(self.root, self.at) if self.at else self.root

    def labelled(self, labels: Sequence[int]) -> Files:
        """The images whose label is not negative, with their labels."""
        keep = [i for i, label in enumerate(labels) if label >= 0]
        spans = [self.spans[i] for i in keep] if self.spans else ()
        some = Files(self.root, self.at, [self.names[i] for i in keep], self.left, spans)
        some.labels = array("q", (labels[i] for i in keep))
        return some


def opened(path: str | Path) -> Tree:
    """The folder or .tar at `path`; `BadData` where there is neither."""
    path = os.fspath(path)
    if os.path.isdir(path):
        return Folder(path)
    if os.path.isfile(path) and path.endswith(".tar"):
        return Archive(path)
    if not os.path.lexists(path):
        raise BadData(f"{path} does not exist")
    kind = "a file" if os.path.isfile(path) else "neither a folder nor a regular file"
    raise BadData(f"{path} is {kind}: a folder of images, a .tar or a timm data set is expected")


class Folder:
    """A folder tree; links are followed. Places `at` in it are paths below it with '/' between folders, '' for itself."""

    def __init__(self, root: str) -> None:
        self.root = root

    def folders(self, at: str) -> list[str]:
        """Names of the folders in `at`, without hidden ones."""
        return [entry.name for entry in self._entries(at) if _is(entry.is_dir)]

    def loose(self, at: str) -> bool:
        """Whether images lie directly in `at`."""
        return any(_suffix(entry.name) in IMAGES and _is(entry.is_file) for entry in self._entries(at))

    def images(self, at: str) -> Files:
        """All images below `at`; `BadData` if there are none.

        A link that leads to a folder or image of the tree, or to one that another link led to, adds nothing. A link to
        nothing is an image that cannot be read.
        """
        left: Counter[str] = Counter()
        names: list[str] = []
        links: list[str] = []
        root, met = os.path.join(self.root, at), set()
        real_root = os.path.realpath(root) + os.sep
        folders, linked = deque([""]), deque[str]()  # links last: what they lead to keeps its own name
        while folders or linked:
            inside = (folders or linked).popleft()
            path = os.path.join(root, inside)
            if not os.access(path, os.R_OK | os.X_OK):
                left["folders that cannot be read"] += 1
                continue
            known = _identity(path)
            if known in met or (inside and real_root.startswith(os.path.join(os.path.realpath(path), ""))):
                left["links to folders already read"] += 1
                continue
            met.add(known)
            for entry in self._entries(joined(at, inside)):
                name, suffix = joined(inside, entry.name), _suffix(entry.name)
                if _is(entry.is_dir):
                    (linked if entry.is_symlink() else folders).append(name)
                elif suffix in OTHERS:
                    left[f"{suffix} files"] += 1
                elif suffix in IMAGES and entry.is_symlink():
                    links.append(name)
                elif suffix in IMAGES and entry.is_file():
                    names.append(name)
                elif suffix in IMAGES:
                    left[_NO_FILES] += 1
        met = {_identity(os.path.join(root, name)) for name in names} if links else set()
        for name in links:
            path = os.path.join(root, name)
            if not os.path.exists(path):
                names.append(name)
            elif not os.path.isfile(path):
                left[_NO_FILES] += 1
            elif (known := _identity(path)) in met:
                left["links to images already read"] += 1
            else:
                met.add(known)
                names.append(name)
        _some(names, root, left)
        return Files(self.root, at, sorted(names, key=in_order), left)

    def _entries(self, at: str) -> list[os.DirEntry]:
        """What is not hidden, by name; nothing of a folder that cannot be read."""
        with contextlib.suppress(OSError), os.scandir(os.path.join(self.root, at)) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        return []


class Archive:
    """As `Folder`, of a .tar, not compressed; a .tar in it stands for a folder. Read once from end to end, not unpacked."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.left: Counter[str] = Counter()
        self.spans: dict[str, tuple[int, int]] = {}  # of several members with one name the last counts, as in unpacking
        try:
            with open(root, "rb") as file:
                self._read(file, 0, "", 0)
        except Exception as error:  # tarfile raises a dozen kinds of exception on damaged files
            raise BadData(f"{root} is not a .tar of images: {one_line(error, 100)}") from error

    def folders(self, at: str) -> list[str]:
        inside = (name for name in self._below(at) if "/" in name)
        return sorted({name.partition("/")[0] for name in inside})

    def loose(self, at: str) -> bool:
        return any("/" not in name for name in self._below(at))

    def images(self, at: str) -> Files:
        """All images below `at`; `BadData` if there are none."""
        names = sorted(self._below(at), key=in_order)
        _some(names, self.root, self.left)
        return Files(self.root, at, names, self.left, [self.spans[joined(at, name)] for name in names])

    def _below(self, at: str) -> Iterable[str]:
        prefix = f"{at}/" if at else ""
        return (name[len(prefix) :] for name in self.spans if name.startswith(prefix))

    def _read(self, file: BinaryIO, start: int, inside: str, depth: int) -> None:
        """Adds the images of the archive in `file`, whose first byte is byte `start` of the outermost one."""
        before, last, whole = len(self.spans), -1, False
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if tar.offset <= last:
                        raise tarfile.ReadError("a member of negative size")
                    last = tar.offset
                    self._add(tar, member, start, inside, depth)
                file.seek(tar.offset)
                whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except tarfile.TarError:
            if last < 0 and not depth:
                raise
        if not whole:
            name = f"{inside}.tar" if inside else os.path.basename(self.root)
            self.left[f"what follows the first {len(self.spans) - before:,} images of {name} (cut off or damaged)"] = 0

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, start: int, inside: str, depth: int) -> None:
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        name, suffix = joined(inside, "/".join(parts)), _suffix(member.name)
        if member.isdir() or any(part.startswith(".") for part in parts):
            return
        if suffix in OTHERS:
            self.left[f"{suffix} files"] += 1
        elif suffix in IMAGES and (not member.isreg() or member.issparse()):
            self.left["links, pipes or sparse files in the archive"] += 1
        elif suffix in IMAGES:
            self.spans[name] = start + member.offset_data, member.size
        elif suffix == ".tar" and member.isreg() and depth < 2:
            inner = cast(BinaryIO, tar.extractfile(member))
            self._read(inner, start + member.offset_data, name.removesuffix(".tar"), depth + 1)


Tree = Folder | Archive


def in_order(name: str) -> tuple[list[Any], str]:
    """Sorts names as timm does: numbers in them by their value, without regard to case."""
    return natural_key(name), name


def left_out(left: Counter[str]) -> str:
    """What was left out, in words; '' if nothing."""
    return f"left out: {', '.join(f'{n:,} {what}' if n else what for what, n in sorted(left.items()))}" if left else ""


def _some(names: list[str], place: str, left: Counter[str]) -> None:
    if not names:
        aside = f"; {left_out(left)}" if left else ""
        raise BadData(f"{place} holds no images ({' '.join(IMAGES)}){aside}")


def _is(check: Callable[[], bool]) -> bool:
    """Whether the kind of an entry is as asked; a link that leads to itself is of no kind."""
    try:
        return check()
    except OSError:
        return False


def _identity(path: str) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_dev, info.st_ino


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def joined(at: str, name: str) -> str:
    return f"{at}/{name}" if at and name else at or name
