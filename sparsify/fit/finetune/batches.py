"""Training images -> the batches of a stage: the same for any number of processes and workers, from any step on.

The order of an epoch depends on (seed, stage, epoch), the augmentation of an image on (seed, stage, epoch, index), mixup on
(seed, stage, step, process, micro-batch), and nothing else. Random numbers of the caller are left as they were.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparsify import processes
from sparsify.errors import BadData, UsageError
from sparsify.images.datasets import train_transform, transform
from sparsify.images.loaders import (
    Items,
    StreamPart,
    batches_of,
    drawn,
    drawn_number,
    ignore_interrupt,
    in_shared_memory,
    read,
)
from sparsify.recipe import Augmentation

ATTEMPTS = 4  # draws of an augmentation: Pillow 13 refuses one in 300 of timm's rand-m9 (posterize to 0 bits)


@dataclass(frozen=True)
class BatchSettings:
    """What the batches of a stage depend on besides its images."""

    augmentation: Augmentation
    preprocessing: dict[str, Any]  # the model's (`datasets.data_config`)
    seed: int
    stage: int  # number of the stage in its recipe
    batch_size: int  # images of a step, over all processes; process `rank` takes its of `world` equal slices
    micro_batch: int  # maximum images per forward/backward pass: the largest divisor of the slice up to it is used
    num_classes: int | None  # outputs of the model; None: labels are not used
    workers: int = 0  # processes that read and augment; 0: this one. A stream is always read by this one
    world: int = field(default_factory=processes.world)
    rank: int = field(default_factory=processes.rank)


class Batch(NamedTuple):
    """Images computed together."""

    x: Tensor  # images, float32 [b, C, H, W]
    y: Tensor | None  # soft targets, float32 [b, classes], rows sum to 1; None where labels are not used
    index: Tensor  # type: ignore[assignment]  # hides tuple.index: int64 [b], in the training set or a stream's pass


class _Request(NamedTuple):
    """A micro-batch to be made."""

    step: int
    micro: int
    epoch: int
    indices: list[int]


class _Made(NamedTuple):
    """A micro-batch, or the error why there is none; and the images that cannot be read: index, name and reason."""

    batch: Batch | None
    broken: list[tuple[int, str]]
    error: str = ""


class Batches:
    """What one process computes of a stage, from images by index or a stream (`TrainSet.learn`), called `name` in messages.

    Raises `UsageError` where batch_size cannot be divided evenly, or timm knows no such augmentation, and `BadData` where
    there are fewer images than a batch.
    """

    def __init__(self, source: Items | StreamPart, settings: BatchSettings, name: str = "the data") -> None:
        batch_size, world = settings.batch_size, settings.world
        if batch_size % world:
            problem = f"batch of {batch_size} cannot be divided evenly among {world} processes"
            raise UsageError(f"{problem}: choose a multiple of {world}")
        self.source, self.settings, self.name = source, settings, name
        self.slice = batch_size // world  # images of a step that this process computes, `micro` of them together
        self.micro = _micro_batch(self.slice, settings.micro_batch, settings.augmentation.mixes)
        # the incomplete rest of an epoch is left out, as by timm; None for a stream, whose passes follow without a gap
        self.steps_per_epoch = None if isinstance(source, StreamPart) else len(source) // batch_size
        if self.steps_per_epoch == 0:
            problem = f"batch of {batch_size} is larger than the {len(cast(Items, source)):,} images of {name}"
            raise BadData(f"{problem}: choose a smaller batch, or add images")
        self._maker = _Maker(settings, source)
        # images that could not be read so far: name and reason, by number. The next readable image replaces each
        self.broken: dict[int, str] = {}

    def from_step(self, step: int) -> Iterator[list[Batch]]:
        """This process's micro-batches of each optimiser step of the stage from `step` (from 0) on, without end.

        A stream is read again from its beginning, and what lies before `step` is thrown away. Raises `BadData` while
        iterating where none of the images can be read, or the model cannot give a label.
        """
        source = self.source
        makes = self._from_stream(source, step) if isinstance(source, StreamPart) else self._from_items(source, step)
        with closing(makes) as all_made:
            while True:
                batches = []
                for made in islice(all_made, self.slice // self.micro):
                    self.broken.update(made.broken)
                    if made.batch is None:
                        raise BadData(f"{self.name}{made.error}")
                    batches.append(made.batch)
                yield batches

    def _from_items(self, items: Items, step: int) -> Generator[_Made, None, None]:
        loader = DataLoader(
            self._maker,
            batch_size=None,
            sampler=self._requests(len(items), step),
            num_workers=self.settings.workers,
            collate_fn=nn.Identity(),
            worker_init_fn=ignore_interrupt,
            generator=torch.Generator(),  # else it draws from the global one
        )
        return batches_of(loader)

    def _requests(self, total: int, step: int) -> Iterator[_Request]:
        """The micro-batches of this process, of `total` images, from `step` on, without end."""
        s, steps = self.settings, total // self.settings.batch_size
        while True:
            epoch, first = divmod(step, steps)
            order = np.random.default_rng(drawn_number(s.seed, "order", s.stage, epoch)).permutation(total)
            for number in range(first, steps):
                start = number * s.batch_size + s.rank * self.slice
                for micro in range(self.slice // self.micro):
                    yield _Request(step, micro, epoch, order[start + micro * self.micro :][: self.micro].tolist())
                step += 1

    def _from_stream(self, stream: StreamPart, step: int) -> Generator[_Made, None, None]:
        batch_size = self.settings.batch_size
        images = self._passes(stream, step * batch_size + self.settings.rank * self.slice)
        while True:
            for micro in range(self.slice // self.micro):
                some = list(islice(images, self.micro))
                x = [self._maker.augmented(image.convert("RGB"), number, i) for number, i, image, _ in some]
                yield self._maker.made(x, [label for *_, label in some], [i for _, i, *_ in some], step, micro)
            for _ in islice(images, batch_size - self.slice):
                pass
            step += 1

    def _passes(self, stream: StreamPart, skip: int) -> Iterator[tuple[int, int, Image.Image, int]]:
        """(pass, number in it, image, label) without end, the first `skip` left out."""
        number = 0
        while True:
            seen = 0
            for seen, (image, label) in enumerate(stream, 1):
                if skip:
                    skip -= 1
                else:
                    yield number, seen - 1, image, label
            if not seen:
                raise BadData(f"{self.name} has no training images")
            number += 1 + skip // seen  # passes that are skipped whole are not read
            skip %= seen


class _Maker(Dataset):
    """Images -> micro-batch. Pickled for spawned workers, so it and what it is made of stand at the top level."""

    def __init__(self, settings: BatchSettings, source: Items | StreamPart) -> None:
        self.settings, self.source, augmentation = settings, source, settings.augmentation
        config = settings.preprocessing
        self.transform = transform(config) if augmentation.form == "eval" else train_transform(augmentation, config)
        self.mixup = None
        if augmentation.mixes:
            self.mixup = Mixup(
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                prob=augmentation.mixup_prob,
                switch_prob=augmentation.mixup_switch,
                label_smoothing=augmentation.smoothing,
                num_classes=settings.num_classes or 1,
            )

    def augmented(self, image: Image.Image, epoch: int, index: int, attempt: int = 0) -> Tensor:
        s = self.settings
        with drawn(s.seed, "image", s.stage, epoch, index, *([attempt] if attempt else [])):
            try:
                return self.transform(image)  # [C, H, W]
            except ValueError:
                if attempt + 1 == ATTEMPTS:
                    raise
        return self.augmented(image, epoch, index, attempt + 1)

    def made(self, images: list[Tensor], labels: list[int], indices: list[int], step: int, micro: int) -> _Made:
        s, classes = self.settings, self.settings.num_classes
        if classes is None:
            labels = [0] * len(labels)
        elif min(labels) < 0:
            return _Made(None, [], " has images without labels: the loss classification needs them")
        elif max(labels) >= classes:
            return _Made(None, [], f" has a label {max(labels)}, but the model has {classes:,} classes")
        x, y = torch.stack(images), torch.tensor(labels)  # [b, C, H, W], [b]
        if self.mixup is not None:
            with drawn(s.seed, "mixup", s.stage, step, s.rank, micro):
                x, y = self.mixup(x, y)
        elif classes is not None:
            y = mixup_target(y, classes, smoothing=s.augmentation.smoothing)
        return _Made(Batch(x, None if classes is None else y, torch.tensor(indices)), [])

    def __getitem__(self, request: _Request) -> _Made:
        items, images, labels, indices = cast(Items, self.source), [], [], []
        broken: dict[int, str] = {}
        for requested in request.indices:
            for index in (*range(requested, len(items)), *range(requested)):
                result = read(items, index)
                if not isinstance(result, str):
                    break
                broken[index] = result
            else:
                error = f": none of the {len(broken):,} images can be read, as {next(iter(broken.values()))}"
                return _Made(None, list(broken.items()), error)
            # a replacement is augmented as the broken image would have been: no copy of itself in this epoch
            images.append(self.augmented(result[0], request.epoch, requested))
            labels.append(result[1])
            indices.append(index)
        made = self.made(images, labels, indices, request.step, request.micro)._replace(broken=list(broken.items()))
        in_shared_memory(*(made.batch or ()))
        return made


def _micro_batch(images: int, most: int, even: bool) -> int:
    """The largest divisor of `images` up to `most`, even where `even`."""
    sizes = [n for n in range(1, min(images, most) + 1) if images % n == 0 and not (even and n % 2)]
    if sizes:
        return sizes[-1]
    if images % 2:
        problem = f"mixup and cutmix need an even number of images in each process, not {images}"
        raise UsageError(f"{problem}: choose another batch size")
    rule = "mixup and cutmix mix images that are computed together"
    raise UsageError(f"{rule}: micro-batch of {most}, at least 2 expected")
