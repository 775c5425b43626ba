"""Images by index or as a stream -> batches in a fixed order; broken images are left out and counted, never replaced."""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sparsify.errors import BadData

Transform = Callable[[Image.Image], Tensor]


class Items(Protocol):
    """Images by index: an open file, a path or a PIL image; the label, -1 where there is none; a name for messages."""

    def __len__(self) -> int: ...

    def fetch(self, index: int) -> tuple[Any, int]: ...

    def name(self, index: int) -> str: ...


class Reader:
    """timm's folder, tar and hub readers; `indices` picks images, `classes` maps their class index to the model's."""

    def __init__(self, reader: Any, indices: Sequence[int], classes: dict[int, int] | None = None) -> None:
        self.reader, self.indices, self.classes = reader, indices, classes

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, index: int) -> tuple[Any, int]:
        image, label = self.reader[self.indices[index]][:2]
        label = -1 if label is None else int(label)
        return image, label if self.classes is None else self.classes[label]

    def name(self, index: int) -> str:
        try:
            return str(self.reader.filename(self.indices[index]))
        except Exception:  # hub readers have no file names
            return f"image {self.indices[index]}"


class Mapped:
    """Any map-style data set of (PIL image, label), or a sequence of PIL images."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, index: int) -> tuple[Any, int]:
        item = self.source[index]
        return (item[0], int(item[1])) if isinstance(item, tuple) else (item, -1)

    def name(self, index: int) -> str:
        return f"image {index}"


class Part:
    """Some of `items`, in the order of `indices`; without `labels` each label is -1."""

    def __init__(self, items: Items, indices: Sequence[int], labels: bool = True) -> None:
        self.items, self.indices, self.labels = items, indices, labels

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, index: int) -> tuple[Any, int]:
        image, label = self.items.fetch(self.indices[index])
        return image, label if self.labels else -1

    def name(self, index: int) -> str:
        return self.items.name(self.indices[index])


class StreamPart:
    """(PIL image, label) `start` to `stop` (left out; None: the end) of each pass over `source`; labels as in `Part`."""

    def __init__(self, source: Iterable, start: int = 0, stop: int | None = None, labels: bool = True) -> None:
        self.source, self.start, self.stop, self.labels = source, start, stop, labels

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for image, label, *_ in islice(self.source, self.start, self.stop):
            yield image, int(label) if self.labels else -1


def read(items: Items, index: int) -> tuple[Image.Image, int] | str:
    """RGB image and label, or the name and reason of an image that cannot be read."""
    try:
        file, label = items.fetch(index)
        image = file if isinstance(file, Image.Image) else Image.open(file)
        return image.convert("RGB"), label  # decodes; PIL raises a dozen kinds of exception on damaged files
    except Exception as error:
        return f"{items.name(index)} ({' '.join(str(error).split())[:80] or type(error).__name__})"


class Decoded(Dataset):
    """(tensor, label), or the name and reason of an image that cannot be read."""

    def __init__(self, items: Items, transform: Transform) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        found = read(self.items, index)
        return found if isinstance(found, str) else (self.transform(found[0]), found[1])


class Stream(IterableDataset):
    """timm's iterable data sets (tfds, wds, hfids), which decode by themselves; at most `limit` images."""

    def __init__(self, source: Iterable, transform: Transform, limit: int | None = None) -> None:
        self.source, self.transform, self.limit = source, transform, limit

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for count, (image, label, *_) in enumerate(self.source):
            if self.limit is not None and count >= self.limit:
                return
            yield self.transform(image.convert("RGB")), int(label)


class _Loader:
    """Batches in a fixed order. After an iteration `broken` counts the images left out, `first_broken` names one.

    Attributes:
        total: images that will be tried; None for streams.
        note: one line for the user (what was left out or mapped), or ''.
        part: of what several processes read (`sparsify.images.sharing`): it may hold nothing.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 32,
        workers: int = 0,
        strict: bool = False,
        note: str = "",
        place: str = "",
        num_classes: int | None = None,
        part: bool = False,
    ) -> None:
        self.part = part
        self.dataset, self.batch_size, self.workers, self.strict = dataset, batch_size, workers, strict
        self.note, self.place, self.num_classes = note, place, num_classes
        self.total = None if isinstance(dataset, IterableDataset) else len(cast(Any, dataset))
        self.broken = 0
        self.first_broken = ""

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.broken, self.first_broken, good = 0, "", 0
        loader = DataLoader(
            self.dataset,
            self.batch_size,
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=ignore_interrupt if self.workers else None,
        )
        batches = iter(loader)
        try:
            for images, labels, failures in batches:
                self.broken += len(failures)
                self.first_broken = self.first_broken or next(iter(failures), "")
                if failures and self.strict:
                    raise BadData(f"{self.place}: cannot read {failures[0]}")
                good += len(labels)
                if len(labels):
                    yield images, labels
        finally:  # also on Ctrl-C and where the caller stops early: ends the workers now, not at the next collection
            shutdown = getattr(batches, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()
        if not good and not self.part:
            first = f"; the first: {self.first_broken}" if self.first_broken else ""
            raise BadData(f"{self.place}: none of the {self.broken} images could be read{first}")


class ImageBatches(_Loader):
    """Yields images, float32 [B, C, H, W].

    Raises while iterating:
        BadData: no image can be read; with `strict`, the first that cannot be.
    """

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self._batches())

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same with labels, int64 [B], -1 where there is none."""
        return self._batches()


class LabelledBatches(_Loader):
    """Yields images, float32 [B, C, H, W], and labels, int64 [B].

    Raises while iterating:
        BadData: as `ImageBatches`; also a label that the model, of `num_classes` outputs, cannot give.
    """

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._batches():
            low, high = int(labels.min()), int(labels.max())
            if low < 0:
                raise BadData(f"{self.place} has images without labels")
            if self.num_classes and high >= self.num_classes:
                raise BadData(f"{self.place} has a label {high}, but the model has {self.num_classes:,} classes")
            yield images, labels


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    good = [item for item in items if not isinstance(item, str)]
    broken = [item for item in items if isinstance(item, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good], dtype=torch.int64), broken


def ignore_interrupt(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: Ctrl-C is for the main process, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def drawn_number(*parts: object) -> int:
    """64 bits that depend on `parts`, numbers and text, alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


@contextmanager
def drawn(*parts: object) -> Iterator[None]:
    """Inside, the global random numbers of Python, numpy and torch (CPU) depend on `parts` alone; then go on as before."""
    number, generator = drawn_number(*parts), torch.default_generator
    states = random.getstate(), np.random.get_state(), generator.get_state()
    try:
        random.seed(number)
        np.random.seed(number % 2**32)
        generator.manual_seed(number >> 1)  # torch.manual_seed would also seed the GPUs'
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        generator.set_state(states[2])
