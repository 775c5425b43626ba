"""Images to fit to and validation images: one data set, divided by a seed; crops of images for least squares."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from sparsify.errors import BadData
from sparsify.images import datasets
from sparsify.images.datasets import all_images, class_images, draw, is_digits, is_prefixed
from sparsify.images.folders import Files
from sparsify.images.loaders import (
    Decoded,
    ImageBatches,
    Items,
    Mapped,
    Part,
    Stream,
    StreamPart,
    Transform,
    drawn,
    read,
    read_whole,
)
from sparsify.images.pictures.pictures import CalibrationImages
from sparsify.recipe import Augmentation

MOST_HELD = 1024
HELD_OF_UNKNOWN = 256  # images held back from a stream that does not know its length
CROP = Augmentation(scale=(0.5, 1.0))  # at least half of the image, flipped or not


@dataclass(frozen=True)
class TrainSet:
    """A data set in two parts without a common image: everything is fitted to the first, calibration included."""

    learn: Items | StreamPart  # images to calibrate on and to learn from, in the listed order
    # images held back, in random order; empty for `hold_back` 0. Those of a stream are the first of each pass
    held: Items | StreamPart
    name: str  # as the user gave it
    note: str  # one line for the user (what was left out or mapped), or ''
    stream: bool  # both parts are a `StreamPart` (wds, tfds, hfids), without a length and read from the beginning
    digest: str  # SHA-256 (hex) over the number of all images and the names of files; not over their bytes

    def calibration(
        self, n: int, seed: int, transform: Transform, batch_size: int = 32, workers: int = 0
    ) -> ImageBatches:
        """Up to `n` images of `learn`, without labels: drawn by `seed`, in random order; of a stream its first."""
        if isinstance(self.learn, StreamPart):
            dataset: Dataset = Stream(self.learn, transform, n)
        else:
            dataset = Decoded(Part(self.learn, draw(len(self.learn), n, seed), labels=False), transform)
        return ImageBatches(dataset, batch_size, workers, name=self.name)

    def fitted(self, images: Any) -> int:
        """How many of `images` are also among `learn`, where both are files; 0 where they are not."""
        mine: Any = self.learn
        if not isinstance(images, Files) or not isinstance(mine, Part) or not isinstance(mine.items, Files):
            return 0
        known = {mine.items.path(index) for index in mine.indices}
        return sum(images.path(index) in known for index in range(len(images)))


def trainset(
    path: str | Path,
    num_classes: int | None = None,
    labels: bool = False,
    seed: int = 0,
    hold_back: float = 0.0,
    split: str = "train",
    names: Sequence[str] = (),
) -> TrainSet:
    """The images of `path`, divided for `seed`: `hold_back` (0 to below 1) of them, 1 to 1024, are held back.

    The only place where images of a conversion are drawn: what judges it has no image that it was calibrated on or learnt
    from.

    Args:
        path: folder, .tar, timm data set (`hfds/NAME`, ...), `digits` (its train split) or `digits:SPLIT`. Of a folder or
            .tar with splits (`splits`) the one to learn from is taken.
        num_classes: outputs of the model, which the labels must fit; ignored without `labels`.
        labels: False: every label is -1, and images of a folder may lie at any depth. True: as `datasets.labelled`.
        split: of timm data sets.
        names: as for `datasets.labelled`.

    A stream holds back its first images: `hold_back` of them where its length is known, else 256. The parts of a stream
    have no common image if each pass over it has the same order.

    Raises:
        BadData: nothing there, no images, fewer than two images with `hold_back` above 0; as `datasets.labelled`.
    """
    spec = str(path)
    plain = not is_digits(spec) and not is_prefixed(spec)
    images, note = class_images(path, num_classes, split, "learn", names) if labels else all_images(path, split)
    if isinstance(images, IterableDataset):
        return _of_stream(images, labels, hold_back, spec, split, note)
    total = len(images)
    held = draw(total, _held(total, hold_back, spec), seed)
    left_out = set(held)
    learn = array("q", (index for index in range(total) if index not in left_out))
    names = [images.name(index) for index in range(total)] if plain else []
    digest = _digest(*_source(spec, split, plain), total, *names)
    return TrainSet(Part(images, learn, labels), Part(images, held, labels), spec, note, False, digest)


def builtin_calibration(
    model_is_digits: bool, n: int, seed: int, transform: Transform, batch_size: int = 32, workers: int = 0
) -> ImageBatches:
    """Calibration images where the user gives none: train digits for the `digits` model, else the built-in images."""
    if model_is_digits:
        return trainset("digits").calibration(n, seed, transform, batch_size, workers)
    pictures = Mapped(CalibrationImages(n, seed))
    return ImageBatches(Decoded(pictures, transform), batch_size, workers, name="built-in pictures")


def _of_stream(images: Any, labels: bool, hold_back: float, spec: str, split: str, note: str) -> TrainSet:
    """Each process reads all images and takes its own part of each batch."""
    read_whole(images)
    total = length_hint(images)  # 0: it does not know
    held = _held(total, hold_back, spec) if total else HELD_OF_UNKNOWN * (hold_back > 0)
    parts = StreamPart(images, held, None, labels), StreamPart(images, 0, held, labels)
    return TrainSet(*parts, spec, note, True, _digest(*_source(spec, split, False), total))


def _held(total: int, hold_back: float, name: str) -> int:
    """Number of images to hold back."""
    if not total:
        raise BadData(f"{name} holds no images")
    if not hold_back:
        return 0
    if total < 2:
        expected = "at least 2 are expected, one to train on and one to hold back; add images, or set hold_back to 0"
        raise BadData(f"{name} holds 1 image: {expected}")
    return min(MOST_HELD, max(1, round(hold_back * total)), total - 1)


def _source(spec: str, split: str, plain: bool) -> tuple[str, ...]:
    """What identifies a data set without file names. A folder may be moved: its own name does not count."""
    if is_digits(spec):
        return ("digits", spec.partition(":")[2] or "train")
    return () if plain else (spec, split)


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


class WithCrops(Dataset):
    """Images for least squares: each as the model sees it, then random crops of them until there are `n`.

    A few hundred images have features in common by chance, which a linear map would learn; with crops it learns fewer. An
    item is (tensor, label), as a whole image with what it loses behind, or name and reason (text) of an image that cannot be
    read. A crop depends on the seed, the image
    and how often it came before. `config` is the model's preprocessing (`datasets.data_config`).
    """

    def __init__(self, items: Items, n: int, config: dict[str, Any], seed: int) -> None:
        self.items, self.n, self.seed = items, n, seed
        self.whole, self.crop = datasets.transform(config), datasets.train_transform(CROP, config)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Any, ...] | str:
        turn, number = divmod(index, len(self.items))
        item = read(self.items, number)
        if isinstance(item, str):
            return item
        if turn == 0:
            return self.whole(item.image), item.label, *item.losses
        with drawn(self.seed, "crop", turn, number):
            return self.crop(item.image), item.label
