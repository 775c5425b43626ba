"""Folders, archives and data sets -> batches, through the model's own preprocessing.

`labelled` gives images and labels to measure on; images to fit to: `trainset`. All loaders are deterministic.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import IterableDataset

from sparsify.errors import BadData, SparsifyError, UsageError, one_line
from sparsify.images import folders, labels
from sparsify.images.digits import scans
from sparsify.images.folders import Files
from sparsify.images.loaders import (
    Decoded,
    Items,
    LabelledBatches,
    Mapped,
    Reader,
    Stream,
    Transform,
)
from sparsify.images.splits import splits_of
from sparsify.nn import hosts
from sparsify.recipe import Augmentation

PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")  # timm's data set prefixes
Purpose = Literal["learn", "measure"]
"""Which split of a data set is taken (`splits`): `learn` is calibrated on too."""
DIGITS: dict[Purpose, str] = {"learn": "train", "measure": "test"}


def data_config(model: nn.Module, img_size: int | None = None) -> dict[str, Any]:
    """The model's preprocessing: input_size (C, H, W), mean, std, interpolation, crop_pct (0 to 1), crop_mode.

    `img_size` (pixels, square) replaces the model's own size.
    """
    config = resolve_model_data_config(model)
    size = hosts.image_size(model) if img_size is None else (img_size, img_size)
    return config | {"input_size": (config["input_size"][0], *size)}


def transform(config: dict[str, Any]) -> Transform:
    """timm's evaluation transform: an RGB PIL image to a float32 tensor [C, H, W], normalised."""
    return create_transform(**config, is_training=False)


def train_transform(augmentation: Augmentation, config: dict[str, Any]) -> Transform:
    """timm's training transform: as `transform`, with the global random numbers of Python, numpy and torch.

    Raises:
        UsageError: timm knows no such `auto_augment` or `interpolation`.
    """
    options = augmentation.model_dump(include={"scale", "ratio", "hflip", "auto_augment"})
    options |= {name: config[name] for name in ("input_size", "mean", "std")}
    options["color_jitter"] = augmentation.color_jitter or None
    options["interpolation"] = augmentation.interpolation or config["interpolation"]
    options |= {"re_prob": augmentation.erase, "re_mode": "pixel"}
    try:
        return create_transform(is_training=True, **options)
    except (AssertionError, KeyError, ValueError) as error:
        asked = f"auto_augment {augmentation.auto_augment} and interpolation {augmentation.interpolation}"
        raise UsageError(f"timm makes no transform with {asked}: {one_line(error, 100)}") from error


def labelled(
    path: str | Path,
    num_classes: int | None,
    transform: Transform,
    batch_size: int = 32,
    workers: int = 0,
    strict: bool = False,
    split: str = "validation",
    names: Sequence[str] = (),
) -> LabelledBatches:
    """Images with labels for a model of `num_classes` outputs (0 or None: features only; classes are only counted).

    One output, a binary head's or a regression's, has no classes either: any folders will do.

    Args:
        path: a folder of class folders or a .tar of them, of whose splits (`splits`) the one to measure on is taken; a timm
            data set (`hfds/NAME`, `torch/NAME:ROOT`, ...), `digits` (test split) or `digits:train`.
        split: of timm data sets.
        names: of all classes of the model, where they are known (`preprocessing.class_names`).

    Which label an image has: `labels.labelled`.

    Raises:
        BadData: nothing there, no class folders, or another number of classes than the model's.
    """
    num_classes = num_classes if num_classes != 1 else 0
    images, note = class_images(path, num_classes, split, "measure", names)
    dataset = Stream(images, transform) if isinstance(images, IterableDataset) else Decoded(images, transform)
    return LabelledBatches(dataset, batch_size, workers, strict, note, str(path), num_classes)


def all_images(path: str | Path, split: str, purpose: Purpose = "learn") -> tuple[Items | IterableDataset, str]:
    """All images of `path` for `purpose`, at any depth, in the listed order, and one line for the user."""
    spec = str(path)
    if is_digits(spec):
        return Mapped(scans.Digits(_digits_split(spec, DIGITS[purpose]))), ""
    if is_prefixed(spec):
        return _of(_timm_dataset(spec, split)), ""
    files, _, notes = from_files(path, purpose)
    return files, "; ".join(notes)


def class_images(
    path: str | Path, num_classes: int | None, split: str, purpose: Purpose, names: Sequence[str] = ()
) -> tuple[Items | IterableDataset, str]:
    """The images of `path` with the model's labels, in the listed order, and one line for the user; see `labelled`."""
    spec = str(path)
    if is_digits(spec):
        digits = scans.Digits(_digits_split(spec, DIGITS[purpose]))
        return labels.of_dataset(Mapped(digits), spec, digits.classes, num_classes, names)
    if not is_prefixed(spec):
        files, beside, notes = from_files(path, purpose)
        files, more = labels.labelled(files, beside, num_classes, names)
        return files, "; ".join(notes + more)
    images = _of(_timm_dataset(spec, split))
    classes = () if isinstance(images, IterableDataset) else images.classes
    return labels.of_dataset(images, spec, classes, num_classes, names)


def draw(total: int, n: int, seed: int) -> list[int]:
    """`n` indices of `total`, in random order, so that the first images, which decide the ranks, are of many classes."""
    return random.Random(seed).sample(range(total), min(n, total))


def is_digits(spec: str) -> bool:
    """Whether `spec` is the built-in data set: `digits` or `digits:SPLIT`."""
    return spec.partition(":")[0] == "digits"


def _digits_split(spec: str, default: str) -> str:
    split = spec.partition(":")[2] or default
    if split not in scans.SPLITS:
        raise BadData(f"digits has the splits {' and '.join(scans.SPLITS)}, not '{split}'")
    return split


def from_files(path: str | Path, purpose: Purpose) -> tuple[Files, list[str], list[str]]:
    """The images of a folder or .tar for `purpose`, names of the folders beside them, and what to tell the user."""
    tree = folders.opened(path)
    splits = splits_of(tree)
    at = splits.learn if purpose == "learn" else splits.measure
    files = tree.images(at)
    notes = [f"the images of {files.place}"] if at else []
    return files, tree.folders(at), notes + ([folders.left_out(files.left)] if files.left else [])


def is_prefixed(spec: str) -> bool:
    """Whether `spec` is a timm data set (`hfds/NAME`, ...) and not a folder of that name."""
    return spec.partition("/")[0].lower() in PREFIXES and "/" in spec and not Path(spec).exists()


def _of(dataset: Any) -> Reader | Mapped | IterableDataset:
    """timm's own data sets replace a broken image by the next, so only their reader is used; torchvision's as they are."""
    if isinstance(dataset, IterableDataset):
        return dataset
    return Reader(dataset.reader) if hasattr(dataset, "reader") else Mapped(dataset)


def _timm_dataset(spec: str, split: str) -> Any:
    """`PREFIX/NAME` or `PREFIX/NAME:ROOT`, by timm. Nothing is downloaded for `torch/`; it needs a ROOT."""
    name, _, root = spec.partition(":")
    if name.lower().startswith("torch/") and not root:
        raise BadData(f"{spec} needs the folder it lies in: {name}:FOLDER")
    try:
        return create_dataset(name, root=root or None, split=split)
    except SparsifyError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        advice = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        raise BadData(f"data set {spec} (split {split}) cannot be opened: {reason}{advice}") from error
