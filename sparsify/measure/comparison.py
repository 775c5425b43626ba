"""Several sparse models beside one dense model on the same images, each image read once and the dense model run once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from sparsify.errors import SparsifyError
from sparsify.images import datasets
from sparsify.images.loaders import LabelledBatches, Stream
from sparsify.measure.accuracy import Evaluation, Features, Logits
from sparsify.nn import hosts

EVAL_BATCH = 32  # images computed together
Batches = Iterable[tuple[Tensor, Tensor]]


class _Loose:
    """Images without labels as batches of images and the label -1; attributes as `LabelledBatches`."""

    note = ""

    def __init__(self, images: Any) -> None:
        self.images, self.total = images, images.total

    @property
    def broken(self) -> int:
        return int(self.images.broken)

    @property
    def first_broken(self) -> str:
        return str(self.images.first_broken)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x, torch.full((len(x),), -1)) for x in self.images)


def images_of(
    model: nn.Module, place: str, classes: int, must_be_labelled: bool, limit: int | None, seed: int, workers: int
) -> tuple[LabelledBatches | _Loose, bool]:
    """The images to evaluate on, `limit` of them drawn by `seed`, and whether they have labels."""
    transform = datasets.transform(datasets.data_config(model))
    if not must_be_labelled and _is_flat(Path(place)):
        wanted = limit or len(list(Path(place).iterdir()))
        return _Loose(datasets.unlabelled(place, wanted, seed, transform, EVAL_BATCH, workers)), False
    found = datasets.labelled(place, classes, transform, EVAL_BATCH, workers)
    if limit is None or (found.total is not None and found.total <= limit):
        return found, True
    if isinstance(found.dataset, Stream):
        dataset: Any = Stream(found.dataset.source, transform, limit)
    else:  # drawn, in their order: the first images of a folder are those of its first classes
        drawn = sorted(random.Random(seed).sample(range(cast(int, found.total)), limit))
        dataset = Subset(found.dataset, drawn)
    return LabelledBatches(
        dataset, EVAL_BATCH, found.workers, note=found.note, place=place, num_classes=found.num_classes
    ), True


def _is_flat(path: Path) -> bool:
    """Whether `path` is a folder of files alone: nothing that could name a class."""
    return path.is_dir() and not any(child.is_dir() for child in path.iterdir())


@torch.inference_mode()
def compare(
    dense: nn.Module, sparse: Mapping[str, nn.Module], batches: Batches, classes: int, labelled: bool,
    device: torch.device, dtype: torch.dtype, progress: Callable[[int], None],
) -> dict[str, Evaluation]:  # fmt: skip
    """Every sparse model beside the dense one, which computes once; as `sparsify.measure.evaluate` without its clock."""
    prefix = hosts.num_prefix_tokens(dense)
    sums = {name: Logits() if classes else Features(prefix) for name in sparse}
    done = 0
    for x, y in batches:
        if not len(x):
            continue
        x = x.to(device, dtype)
        expected = _output(dense, x, classes)
        for name, model in sparse.items():
            sums[name].add(cast(Any, expected), cast(Any, _output(model, x, classes)), y)
        done += len(x)
        progress(done)
    if not done:
        raise SparsifyError("there are no images to evaluate on")
    unknown = () if labelled else (
        "top1", "top5", "dense_top1", "dense_top5", "images_lost", "images_gained", "knn_top1", "dense_knn_top1",
    )  # fmt: skip
    return {
        name: replace(found.result(done), images=done, **cast(Any, dict.fromkeys(unknown)))
        for name, found in sums.items()
    }


def _output(model: nn.Module, x: Tensor, classes: int) -> Tensor | tuple[Tensor, Tensor]:
    """Logits; of models without a classifier pooled features and tokens."""
    if classes:
        return model(x)
    host = cast(Any, model)
    features = host.forward_features(x)
    return host.forward_head(features, pre_logits=True), features
