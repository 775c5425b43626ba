"""Images by index or as a stream -> batches in a fixed order; unreadable images are left out and counted, not replaced."""

from __future__ import annotations

import errno
import hashlib
import random
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from dataclasses import field as data_field
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from sparsify import processes
from sparsify.errors import BadData, BadLabels, SparsifyError, field, one_line
from sparsify.images import decode
from sparsify.images.decode import decoded

Transform = Callable[[Image.Image], Tensor]
L = TypeVar("L", bound="_Loader")


class Items(Protocol):
    """Images by index: an open file, a path or a PIL image, with its label (-1: none), and its name for messages."""

    def __len__(self) -> int: ...

    def fetch(self, index: int) -> tuple[Any, int]: ...

    def name(self, index: int) -> str: ...


class Reader:
    """The images of timm's readers of hubs; `classes`: their names by number, none where the reader does not know them."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.classes: Sequence[str] = sorted(numbers := getattr(reader, "class_to_idx", {}), key=numbers.__getitem__)

    def __len__(self) -> int:
        return len(self.reader)

    def fetch(self, index: int) -> tuple[Any, int]:
        image, label = self.reader[index][:2]
        return image, -1 if label is None else int(label)

    def name(self, index: int) -> str:
        return f"image {index}"


class Mapped:
    """Any map-style data set of (PIL image, label), or a sequence of PIL images; `classes`: as of `Reader`."""

    def __init__(self, source: Any) -> None:
        self.source, self.classes = source, getattr(source, "classes", None) or ()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def targets(self) -> Sequence[str]:
        """What the source says of each image without reading it (`targets` or `labels`), as text; else none."""
        found: Any = getattr(self.source, "targets", getattr(self.source, "labels", None))
        return [str(each) for each in found] if hasattr(found, "__len__") and len(found) == len(self) else ()

    def fetch(self, index: int) -> tuple[Any, int]:
        item = self.source[index]
        return (item[0], int(item[1])) if isinstance(item, tuple) else (item, -1)

    def name(self, index: int) -> str:
        return f"image {index}"


class Part:
    """The images of `items` at `indices`, in that order; without `labels` each label is -1."""

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
    """Every `step`-th image from `start` up to `stop` (None: the end) of each pass over `source`; labels as in `Part`."""

    def __init__(
        self, source: Iterable, start: int = 0, stop: int | None = None, labels: bool = True, step: int = 1
    ) -> None:
        self.source, self.start, self.stop, self.labels, self.step = source, start, stop, labels, step

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for image, label, *_ in islice(self.source, self.start, self.stop, self.step):
            yield image, int(label) if self.labels else -1


class Picture(NamedTuple):
    """An RGB image."""

    image: Image.Image
    label: int  # -1: none
    losses: tuple[str, ...] = ()  # what its pixels lost (`decode.decoded`)


def read(items: Items, index: int) -> Picture | str:
    """The image, or name and reason (text) of one that cannot be read."""
    try:
        file, label = items.fetch(index)
        image, losses = decoded(file)  # PIL raises a dozen kinds of exception on damaged files
        return Picture(image, label, losses)
    except Exception as error:
        return f"{items.name(index)} ({one_line(error, 80)})"


class Decoded(Dataset):
    """(tensor, label, *losses), or name and reason (text) of an image that cannot be read."""

    def __init__(self, items: Items, transform: Transform) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, ...] | str:
        item = read(self.items, index)
        return item if isinstance(item, str) else (self.transform(item.image), item.label, *item.losses)


class Stream(IterableDataset):
    """At most `limit` images of timm's iterable data sets (tfds, wds, hfids), which decode them themselves."""

    def __init__(self, source: Iterable, transform: Transform, limit: int | None = None) -> None:
        self.source, self.transform, self.limit = source, transform, limit

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for count, (image, label, *_) in enumerate(self.source):
            if self.limit is not None and count >= self.limit:
                return
            yield self.transform(image.convert("RGB")), int(label)


@dataclass
class Flaws:
    """What a pass over images could not read, and what their pixels lost."""

    broken: int = 0  # images that could not be read and are left out
    first_broken: str = ""  # name of one of them, and why
    lost: Counter[str] = data_field(default_factory=Counter)  # images whose pixels lost something, by what

    def __add__(self, other: Flaws) -> Flaws:
        first = self.first_broken or other.first_broken
        return Flaws(self.broken + other.broken, first, self.lost + other.lost)

    def lines(self) -> list[str]:
        """What to tell the user after the pass."""
        lines = [f"{self.broken} images could not be read and are left out; the first: {self.first_broken}"]
        return lines[: bool(self.broken)] + ([decode.lost(self.lost)] if self.lost else [])

    def nothing_read(self, name: str) -> BadData:
        """The error of a pass over the images `name` that found none."""
        first = f"; the first: {self.first_broken}" if self.first_broken else ""
        return BadData(f"{name}: none of the {self.broken} images could be read{first}")


@dataclass(eq=False)
class _Loader:
    """Batches in a fixed order, the same in each iteration."""

    dataset: Dataset
    batch_size: int = 32
    workers: int = 0  # processes that read; a stream is always read by this one
    strict: bool = False  # raise at the first unreadable image instead of leaving it out
    note: str = ""  # one line for the user (what was left out or mapped), or ''
    name: str = ""  # of the images, for messages
    num_classes: int | None = None  # outputs of the model; None: not known
    part: bool = False  # one process's part of the images (`share`), which may be empty
    flaws: Flaws = data_field(default_factory=Flaws, init=False)  # of the last iteration

    @property
    def total(self) -> int | None:
        """Images that will be read; None for streams."""
        return None if isinstance(self.dataset, IterableDataset) else len(cast(Any, self.dataset))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.flaws, good = Flaws(), 0
        workers = 0 if isinstance(self.dataset, IterableDataset) else self.workers
        options: dict[str, Any] = {"collate_fn": _collate, "worker_init_fn": ignore_interrupt}
        loader = DataLoader(self.dataset, self.batch_size, num_workers=workers, **options)
        with closing(batches_of(loader)) as batches:
            for images, labels, failures, lost in batches:
                self.flaws += Flaws(len(failures), next(iter(failures), ""), lost)
                if failures and self.strict:
                    raise BadData(f"{self.name}: cannot read {failures[0]}")
                good += len(labels)
                if len(labels):
                    yield images, labels
        if not good and not self.part:
            raise self.flaws.nothing_read(self.name)


class ImageBatches(_Loader):
    """Yields images, float32 [B, C, H, W]; raises `BadData` if none, or with `strict` one, cannot be read."""

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self._batches())


class LabelledBatches(_Loader):
    """Yields images, float32 [B, C, H, W], and labels, int64 [B].

    Raises `BadData` as `ImageBatches`; `BadLabels` for a label that the model, of `num_classes` outputs, cannot give.
    """

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._batches():
            low, high = int(labels.min()), int(labels.max())
            if low < 0:
                raise BadLabels(f"{self.name} has images without labels")
            if self.num_classes and high >= self.num_classes:
                raise BadLabels(f"{self.name} has a label {high}, but the model has {self.num_classes:,} classes")
            yield images, labels


class LooseBatches(LabelledBatches):
    """As `LabelledBatches`; the label is -1 where there is none."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._batches()


class _NoSharedMemory(RuntimeError):
    """Raised in a worker, and by torch again in the process that waits for its batch."""


def in_shared_memory(*tensors: Tensor | None) -> None:
    """In a worker, moves a batch to where the waiting process reads it. Call it on all tensors that a worker returns.

    Torch would do so in a thread, which loses the batch where there is no room, and whoever waits for it waits for ever.
    """
    if get_worker_info() is not None:
        try:
            for tensor in tensors:
                if tensor is not None:
                    tensor.share_memory_()
        except (RuntimeError, OSError) as error:
            raise _NoSharedMemory from error


def _started(loader: DataLoader) -> Any:
    """Its workers, without torch's handler of a worker's death: that raises in the middle of whatever runs then.

    Whoever waits for the batch of a dead worker looks for it every 5 seconds.
    """
    if not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)
    return batches


def batches_of(loader: DataLoader) -> Generator[Any, None, None]:
    """The batches of `loader`, whose workers end with this generator: also on Ctrl-C and where the caller stops early.

    Raises:
        SparsifyError: a worker could not be started, has died, or found no shared memory.
    """
    batches: Any = None
    try:
        batches = _started(loader)
        yield from batches
    except (RuntimeError, OSError) as error:
        if isinstance(error, _NoSharedMemory) or (batches is None and getattr(error, "errno", 0) == errno.ENOSPC):
            less = f"give the container more (shm-size of docker, as 1g), or set {field('workers')} 0"
            raise SparsifyError(f"/dev/shm, the memory that workers share, is full: {less}") from None
        if not loader.num_workers or not (batches is None or "exited unexpectedly" in str(error)):
            raise
        reason = one_line(error) if batches is None else "one ended early, perhaps for lack of memory"
        raise SparsifyError(f"{field('workers')} {loader.num_workers}: {reason}: set fewer, or 0") from error
    finally:
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def share(loader: L) -> L:
    """The part of `loader` that this process reads: every P-th image of P processes.

    An empty part is no error: only all processes together know that there is nothing to read.
    """
    if processes.world() == 1:
        return loader
    images: Any = loader.dataset
    if isinstance(images, Stream):
        read_whole(images.source)
        part: Any = Stream(StreamPart(images.source, processes.rank(), step=processes.world()), images.transform)
    else:
        part = Subset(images, range(processes.rank(), len(images), processes.world()))
    return replace(loader, dataset=part, part=True)


def read_whole(stream: Any) -> None:
    """Let timm's reader of a stream give every process all images: it would share them out unevenly by itself."""
    reader: Any = getattr(stream, "reader", None)
    if hasattr(reader, "dist_num_replicas"):
        reader.dist_rank, reader.dist_num_replicas = 0, 1


def _collate(items: list[tuple[Any, ...] | str]) -> tuple[Tensor, Tensor, list[str], Counter[str]]:
    good = [item for item in items if not isinstance(item, str)]
    broken = [item for item in items if isinstance(item, str)]
    images = torch.stack([item[0] for item in good]) if good else torch.empty(0)
    labels = torch.tensor([item[1] for item in good], dtype=torch.int64)
    in_shared_memory(images, labels)
    return images, labels, broken, Counter(loss for item in good for loss in item[2:])


def ignore_interrupt(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: the main process handles Ctrl-C and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def drawn_number(*parts: object) -> int:
    """A number of 64 bits that depends only on `parts` (numbers and text)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


@contextmanager
def drawn(*parts: object) -> Iterator[None]:
    """Inside, global random numbers of Python, numpy and torch (CPU) depend only on `parts`; afterwards they continue."""
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
