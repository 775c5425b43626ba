"""Images that are given by paths, without labels: files, folders and archives at any depth, and data sets."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

from torch.utils.data import IterableDataset

from sparsify.errors import BadData, UsageError, field
from sparsify.images import datasets, folders
from sparsify.images.loaders import Items, Part
from sparsify.images.sampling import spread


@dataclass(frozen=True)
class ImagePaths:
    """Images to run a model on."""

    paths: tuple[str, ...]  # image files, folders, .tar, timm data sets, digits
    limit: int | None = None  # how many, drawn by `seed` and spread over the folders; None: all
    seed: int = 0
    strict: bool = False  # an image that cannot be read is an error

    def __post_init__(self) -> None:
        if not self.paths:
            raise UsageError("no images: files or folders are expected")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"{field('limit')} {self.limit}: expected 1 or more")


class ImageFiles:
    """Image files by their paths."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, index: int) -> tuple[Any, int]:
        return self.paths[index], -1

    def name(self, index: int) -> str:
        return self.paths[index]


class Joined:
    """Several sets of images as one; an image's name begins with the path of its set, '' for none."""

    def __init__(self, sets: Sequence[tuple[str, Items]]) -> None:
        self.sets = sets
        self.ends = list(accumulate(len(items) for _, items in sets))

    def __len__(self) -> int:
        return self.ends[-1]

    def fetch(self, index: int) -> tuple[Any, int]:
        _, items, index = self._at(index)
        return items.fetch(index)

    def name(self, index: int) -> str:
        path, items, index = self._at(index)
        return os.path.join(path, items.name(index))

    def _at(self, index: int) -> tuple[str, Items, int]:
        which = bisect_right(self.ends, index)
        return *self.sets[which], index - (self.ends[which - 1] if which else 0)


class Numbered:
    """The images of `items`; the label of each is its number, which tells what was read where some could not be."""

    def __init__(self, items: Items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, index: int) -> tuple[Any, int]:
        return self.items.fetch(index)[0], index

    def name(self, index: int) -> str:
        return self.items.name(index)


def opened(images: ImagePaths) -> tuple[Items, str]:
    """The images of all paths, in the listed order, and one line for the user. Splits of a data set are all read.

    Raises:
        BadData: nothing there, or no images in a folder.
    """
    sets, notes = [], []
    for path in images.paths:
        found, note = _opened(path)
        sets.append(found)
        notes.append(note)
    items: Items = Joined(sets)
    total, limit = len(items), images.limit
    if limit is not None and limit < total:
        items = Part(items, spread([os.path.dirname(items.name(i)) for i in range(total)], limit, images.seed))
        notes.append(f"{limit:,} of {total:,} images, drawn by seed {images.seed}")
    return items, "; ".join(filter(None, notes))


def _opened(path: str) -> tuple[tuple[str, Items], str]:
    if datasets.is_digits(path) or datasets.is_prefixed(path):
        items, note = datasets.all_images(path, "validation", "measure")
        if isinstance(items, IterableDataset):
            raise BadData(f"{path} is a stream, whose images have no names: give files or folders")
        return (path, cast(Items, items)), note
    if os.path.isfile(path) and not path.endswith(".tar"):
        return ("", ImageFiles([path])), ""
    files = folders.opened(path).images("")
    return (path, files), folders.left_out(files.left)
