"""Images to learn from -> the batches of a stage: the same for any number of processes and workers, from any step on.

The order of an epoch is drawn from (seed, stage, epoch), the augmentation of an image from (seed, stage, epoch, index),
mixup from (seed, stage, step, process, micro-batch), and nothing else. Other random numbers are left as they were.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsify.errors import BadData, UsageError
from sparsify.images.datasets import train_transform, transform
from sparsify.images.loaders import Items, StreamPart, drawn, drawn_number, ignore_interrupt, read
from sparsify.recipe import Augmentation

ATTEMPTS = 4  # draws of an augmentation: Pillow 13 refuses one in 300 of timm's rand-m9 (posterize to 0 bits)


class Batch(NamedTuple):
    """Images computed together.

    Attributes:
        x: images, float32 [b, C, H, W].
        y: soft targets, float32 [b, classes], rows sum to 1; None where labels are not used.
        index: places of the images in what is learned from, int64 [b]; of a stream, in its pass.
    """

    x: Tensor
    y: Tensor | None
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


class _Work(NamedTuple):
    """A micro-batch to be made."""

    step: int
    micro: int
    epoch: int
    indices: list[int]


class _Made(NamedTuple):
    """A micro-batch, and the images that could not be read for it: index, then name and reason; or why there is none."""

    batch: Batch | None
    broken: list[tuple[int, str]]
    error: str = ""


class Batches:
    """What one process sees of a stage.

    Args:
        source: images by index, or a stream; `TrainSet.learn`.
        config: the model's preprocessing (`data.data_config`).
        stage: number of the stage in its recipe.
        batch_size: images of a step, over all processes. Process p takes the p-th of `world` equal slices.
        micro_batch: most images computed together; the largest divisor of a process's share that is no larger is taken.
        workers: processes that read and augment; 0: this one. A stream is always read by this one.
        num_classes: outputs of the model; None: labels are not used.
        place: names the images in messages.

    Attributes:
        micro: images of each micro-batch.
        steps_per_epoch: the incomplete rest of an epoch is left out, as by timm; None for a stream, whose passes follow
            each other without a gap, in its own order.

    Raises:
        UsageError: batch_size cannot be divided evenly, or timm knows no such augmentation.
        BadData: fewer images than a batch.
    """

    def __init__(
        self,
        source: Items | StreamPart,
        augmentation: Augmentation,
        config: dict[str, Any],
        seed: int,
        stage: int,
        batch_size: int,
        world: int,
        rank: int,
        micro_batch: int,
        workers: int,
        num_classes: int | None,
        place: str = "the data",
    ) -> None:
        if batch_size % world:
            raise UsageError(
                f"batch of {batch_size} cannot be divided evenly among {world} processes: choose a multiple of {world}"
            )
        self.source, self.batch_size, self.rank, self.workers, self.place = source, batch_size, rank, workers, place
        self.seed, self.stage = seed, stage
        self.share = batch_size // world
        self.micro = _micro_batch(self.share, micro_batch, augmentation.mixes)
        self.steps_per_epoch: int | None = None
        if not isinstance(source, StreamPart):
            self.steps_per_epoch = len(source) // batch_size
            if not self.steps_per_epoch:
                raise BadData(
                    f"batch of {batch_size} is larger than the {len(source):,} images of {place}: choose a smaller batch, "
                    "or add images"
                )
        self._maker = _Maker(augmentation, config, seed, stage, rank, num_classes)
        self._broken: dict[int, str] = {}

    @property
    def broken(self) -> int:
        """Images met so far that cannot be read, each counted once. The next that can be read stands in for each."""
        return len(self._broken)

    @property
    def first_broken(self) -> str:
        """Name of the first image that could not be read, and why; '' where all could."""
        return next(iter(self._broken.values()), "")

    def from_step(self, step: int) -> Iterator[list[Batch]]:
        """Without end, from optimiser step `step` (from 0) of the stage on: this process's micro-batches of each step.

        A stream is read again from its beginning, and what lies before `step` is thrown away.

        Raises while iterating:
            BadData: none of the images can be read, or a label that the model cannot give.
        """
        source = self.source
        makes = self._streamed(source, step) if isinstance(source, StreamPart) else self._loaded(source, step)
        with closing(makes) as all_made:
            while True:
                batches = []
                for made in islice(all_made, self.share // self.micro):
                    self._broken.update(made.broken)
                    if made.batch is None:
                        raise BadData(f"{self.place}{made.error}")
                    batches.append(made.batch)
                yield batches

    def _loaded(self, items: Items, step: int) -> Generator[_Made, None, None]:
        loader = DataLoader(
            _MicroBatches(items, self._maker),
            batch_size=None,
            sampler=self._work(len(items), step),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=ignore_interrupt if self.workers else None,
            generator=torch.Generator(),  # else it draws from the global one
        )
        made = iter(loader)
        try:
            yield from made
        finally:  # ends the workers now, not at the next collection
            shutdown = getattr(made, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()

    def _work(self, total: int, step: int) -> Iterator[_Work]:
        """The micro-batches of this process, of `total` images, from `step` on, without end."""
        while True:
            epoch, first = divmod(step, total // self.batch_size)
            order = np.random.default_rng(drawn_number(self.seed, "order", self.stage, epoch)).permutation(total)
            for place in range(first, total // self.batch_size):
                start = place * self.batch_size + self.rank * self.share
                for micro in range(self.share // self.micro):
                    indices = order[start + micro * self.micro :][: self.micro].tolist()
                    yield _Work(step, micro, epoch, indices)
                step += 1

    def _streamed(self, stream: StreamPart, step: int) -> Generator[_Made, None, None]:
        images = self._passes(stream, step * self.batch_size + self.rank * self.share)
        while True:
            for micro in range(self.share // self.micro):
                some = list(islice(images, self.micro))
                x = [self._maker.augmented(image.convert("RGB"), number, i) for number, i, image, _ in some]
                yield self._maker.finished(x, [label for *_, label in some], [i for _, i, *_ in some], step, micro)
            for _ in islice(images, self.batch_size - self.share):
                pass
            step += 1

    def _passes(self, stream: StreamPart, skip: int) -> Iterator[tuple[int, int, Image.Image, int]]:
        """(pass, place in it, image, label) without end, but for the first `skip`."""
        number = 0
        while True:
            seen = 0
            for image, label in stream:
                if skip:
                    skip -= 1
                else:
                    yield number, seen, image, label
                seen += 1
            if not seen:
                raise BadData(f"{self.place} has no images to learn from")
            number += 1 + skip // seen  # passes that are skipped whole are not read
            skip %= seen


class _Maker:
    """Images -> micro-batch. Top level, like what it is made of: spawned workers are given it."""

    def __init__(
        self,
        augmentation: Augmentation,
        config: dict[str, Any],
        seed: int,
        stage: int,
        rank: int,
        num_classes: int | None,
    ) -> None:
        self.seed, self.stage, self.rank, self.num_classes = seed, stage, rank, num_classes
        self.smoothing = augmentation.smoothing
        plain = augmentation.form == "eval"
        self.transform = transform(config) if plain else train_transform(augmentation, config)
        self.mixup = None
        if augmentation.mixes:
            self.mixup = Mixup(
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                prob=augmentation.mixup_prob,
                switch_prob=augmentation.mixup_switch,
                label_smoothing=augmentation.smoothing,
                num_classes=num_classes or 1,
            )

    def augmented(self, image: Image.Image, epoch: int, index: int) -> Tensor:
        for attempt in range(ATTEMPTS):
            with drawn(self.seed, "image", self.stage, epoch, index, *([attempt] if attempt else [])):
                try:
                    return self.transform(image)  # [C, H, W]
                except ValueError:
                    if attempt + 1 == ATTEMPTS:
                        raise
        raise AssertionError

    def finished(self, images: list[Tensor], labels: list[int], indices: list[int], step: int, micro: int) -> _Made:
        classes = self.num_classes
        if classes is None:
            labels = [0] * len(labels)
        elif min(labels) < 0:
            return _Made(None, [], " has images without labels: the loss classification needs them")
        elif max(labels) >= classes:
            return _Made(None, [], f" has a label {max(labels)}, but the model has {classes:,} classes")
        x, y = torch.stack(images), torch.tensor(labels)  # [b, C, H, W], [b]
        if self.mixup is not None:
            with drawn(self.seed, "mixup", self.stage, step, self.rank, micro):
                x, y = self.mixup(x, y)
        elif classes is not None:
            y = mixup_target(y, classes, smoothing=self.smoothing)
        return _Made(Batch(x, None if classes is None else y, torch.tensor(indices)), [])


class _MicroBatches(Dataset):
    def __init__(self, items: Items, maker: _Maker) -> None:
        self.items, self.maker = items, maker

    def __getitem__(self, work: _Work) -> _Made:
        images, labels, indices = [], [], []
        broken: dict[int, str] = {}
        for wanted in work.indices:
            for index in (*range(wanted, len(self.items)), *range(wanted)):
                found = read(self.items, index)
                if not isinstance(found, str):
                    break
                broken[index] = found
            else:
                first = next(iter(broken.values()))
                return _Made(
                    None, list(broken.items()), f": none of the {len(broken):,} images can be read, as {first}"
                )
            # an image that stands in is augmented as the other would have been: no copy of itself in this epoch
            images.append(self.maker.augmented(found[0], work.epoch, wanted))
            labels.append(found[1])
            indices.append(index)
        made = self.maker.finished(images, labels, indices, work.step, work.micro)
        return made._replace(broken=list(broken.items()))


def _micro_batch(share: int, most: int, even: bool) -> int:
    sizes = [n for n in range(1, min(share, most) + 1) if share % n == 0 and not (even and n % 2)]
    if sizes:
        return sizes[-1]
    if share % 2:
        raise UsageError(
            f"mixup and cutmix need an even number of images in each process, not {share}: choose another batch size"
        )
    raise UsageError(
        f"mixup and cutmix mix images that are computed together: micro-batch of {most}, at least 2 expected"
    )


def _as_it_is(made: Any) -> Any:
    return made
