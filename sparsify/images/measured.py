"""Images to measure on: with labels or without, all of a set or some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from sparsify.errors import BadLabels, UsageError, field
from sparsify.images import datasets, labels
from sparsify.images.folders import Files
from sparsify.images.loaders import (
    Decoded,
    Items,
    LabelledBatches,
    LooseBatches,
    Part,
    Stream,
    StreamPart,
    Transform,
)
from sparsify.images.sampling import groups_of, spread

SPLIT = "validation"  # of timm data sets
TOGETHER = 5  # images of a class that are drawn together for features, which are compared with others of their class


@dataclass(frozen=True)
class EvaluationImages:
    """What is measured on."""

    path: str  # folder, .tar, timm data set or digits (`datasets.labelled`)
    # True: required. False: not used. None: used, but of images that lie directly in a folder, where nothing names a class
    labels: bool | None = None
    limit: int | None = (
        None  # how many, drawn by `seed`, spread over the classes (of a stream the first ones); None: all
    )
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"{field('limit')} {self.limit}: expected 1 or more")


class Measured(NamedTuple):
    """Batches to measure on; their `note` has one line for the user, or ''."""

    batches: LabelledBatches
    labelled: bool  # otherwise every label is -1
    drawn_from: int | None  # images there, where only some were drawn


def opened(
    images: EvaluationImages,
    num_classes: int,
    transform: Transform,
    *,
    names: Sequence[str] = (),
    batch_size: int = 32,
    workers: int = 0,
    strict: bool = False,
) -> Measured:
    """The batches of `images` for a model of `num_classes` outputs (0: features).

    Args:
        names: of all classes of the model, where they are known.
        strict: an image that cannot be read is an error.

    Raises:
        BadData: nothing there, or no images.
        BadLabels: labels are used, and missing or not the model's.
    """
    classes = num_classes if num_classes != 1 else 0
    with offering_no_labels(images):
        items, note, labelled = _found(images, classes, names)
    together = TOGETHER if labelled and not num_classes else 1
    dataset, drawn_from, more = _some(items, images, labelled, transform, together)
    notes = "; ".join(filter(None, (note, more)))
    kind = LabelledBatches if labelled else LooseBatches
    return Measured(kind(dataset, batch_size, workers, strict, notes, images.path, classes), labelled, drawn_from)


@contextmanager
def offering_no_labels(images: EvaluationImages) -> Iterator[None]:
    """A `BadLabels` from inside says how the images can be used all the same, unless labels are required."""
    try:
        yield
    except BadLabels as error:
        if images.labels is not None:
            raise
        raise BadLabels(f"{error.args[0]}; {field('no_labels')} compares with dense without labels") from error


def _found(images: EvaluationImages, classes: int, names: Sequence[str]) -> tuple[Items | IterableDataset, str, bool]:
    """The images, one line for the user, and whether they have labels."""
    path, use = images.path, images.labels
    if datasets.is_digits(path) or datasets.is_prefixed(path):
        if use is False:
            return *datasets.all_images(path, SPLIT, "measure"), False
        return *datasets.class_images(path, classes, SPLIT, "measure", names), True
    files, beside, notes = datasets.from_files(path, "measure")
    if use is None and not any("/" in name for name in files.names):
        notes.append(f"{files.place} has no class folders: no accuracy, only how far the models agree with dense")
        return files, "; ".join(notes), False
    if use is False:
        return files, "; ".join(notes), False
    files, more = labels.labelled(files, beside, classes, names)
    return files, "; ".join(notes + more), True


def _some(
    items: Items | IterableDataset, images: EvaluationImages, labelled: bool, transform: Transform, together: int
) -> tuple[Any, int | None, str]:
    """The data set of the images asked for, how many there are if it has only some, and a line about that."""
    limit = images.limit
    if isinstance(items, IterableDataset):
        source: Any = items if labelled else StreamPart(items, labels=False)
        return Stream(source, transform, limit), None, "" if limit is None else f"at most the first {limit:,} images"
    total = len(items)
    if limit is None or limit >= total:
        return Decoded(items if labelled else Part(items, range(total), labels=False), transform), None, ""
    groups = groups_of(items)
    drawn = spread(groups, limit, images.seed, together)
    met, every = len({groups[i] for i in drawn}), len(set(groups))
    what = "folders" if isinstance(items, Files) and not labelled else "classes"
    over = f" over {met:,} of {every:,} {what}" if every > 1 else ""
    note = f"{limit:,} of {total:,} images, drawn by seed {images.seed}{over}"
    return Decoded(Part(items, drawn, labels=labelled), transform), total, note
