"""Folders, archives and data sets -> batches, through timm's readers and the model's own preprocessing.

`unlabelled` gives images (calibration), `labelled` images and labels (eval). Both loaders are deterministic.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, create_dataset, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from sparsify.errors import BadData, SparsifyError, UsageError, one_line
from sparsify.images.digits import scans
from sparsify.images.loaders import (
    Decoded,
    ImageBatches,
    Items,
    LabelledBatches,
    Mapped,
    Part,
    Reader,
    Stream,
    Transform,
)
from sparsify.images.pictures.pictures import CalibrationImages
from sparsify.nn import hosts
from sparsify.recipe import Augmentation

PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")  # timm's data set prefixes
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
VAL = ("val", "valid", "validation", "eval", "evaluation")  # timm's names of the split
TRAIN = ("train", "training")


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


def unlabelled(
    path: str | Path,
    n: int,
    seed: int,
    transform: Transform,
    batch_size: int = 32,
    workers: int = 0,
    strict: bool = False,
    split: str = "train",
) -> ImageBatches:
    """Up to `n` images without labels, drawn without replacement by `seed`, in random order.

    Args:
        path: folder (images at any depth), .tar, timm data set (`hfds/...`), or `digits` (its train split).

    Raises:
        BadData: nothing there, or no images.
    """
    images = all_images(path, split)
    if isinstance(images, IterableDataset):
        dataset: Dataset = Stream(images, transform, n)
    else:
        dataset = Decoded(Part(images, draw(len(images), n, seed)), transform)
    return ImageBatches(dataset, batch_size, workers, strict, name=str(path))


def labelled(
    path: str | Path,
    num_classes: int | None,
    transform: Transform,
    batch_size: int = 32,
    workers: int = 0,
    strict: bool = False,
    split: str = "validation",
) -> LabelledBatches:
    """Images with labels for a model of `num_classes` outputs (0 or None: features only; classes are only counted).

    Args:
        path: ImageNet root with `val/`, the val folder, any folder of class folders, a .tar of them, a timm data set
            (`hfds/NAME`, `torch/NAME:ROOT`, ...), `digits` (test split) or `digits:train`.
        split: of timm data sets.

    If the model has as many classes as an ImageNet set, folders named by wnid (n01440764), however many, have the class
    index of their wnid. Other folders are numbered in timm's (natural) order of their names.

    Raises:
        BadData: nothing there, no class folders, or another number of classes than the model's.
    """
    images, note = class_images(path, num_classes, split, "test", VAL)
    dataset = Stream(images, transform) if isinstance(images, IterableDataset) else Decoded(images, transform)
    return LabelledBatches(dataset, batch_size, workers, strict, note, str(path), num_classes)


def builtin_calibration(
    model_is_digits: bool, n: int, seed: int, transform: Transform, batch_size: int = 32, workers: int = 0
) -> ImageBatches:
    """Calibration images where the user gives none: train digits for the `digits` model, else the built-in images."""
    if model_is_digits:
        return unlabelled("digits:train", n, seed, transform, batch_size, workers)
    pictures = Mapped(CalibrationImages(n, seed))
    return ImageBatches(Decoded(pictures, transform), batch_size, workers, name="built-in pictures")


def all_images(path: str | Path, split: str) -> Items | IterableDataset:
    """All images of `path` in the listed order; path and errors as in `unlabelled`."""
    spec = str(path)
    if is_digits(spec):
        return Mapped(scans.Digits(_digits_split(spec, "train")))
    if is_prefixed(spec):
        return _of(_timm_dataset(spec, split))
    reader = _reader(Path(path))
    return Reader(reader, range(len(reader)))


def class_images(
    path: str | Path, num_classes: int | None, split: str, digits_split: str, folders: Sequence[str]
) -> tuple[Items | IterableDataset, str]:
    """The images of `path` with the model's labels, in the listed order, and one line for the user; see `labelled`.

    `digits` stands for `digits_split`; the first of `folders` (names) that lies in `path` is used instead of it.
    """
    spec = str(path)
    if is_digits(spec):
        _same_count(spec, len(scans.Digits.classes), num_classes)
        return Mapped(scans.Digits(_digits_split(spec, digits_split))), ""
    if not is_prefixed(spec):
        return _folder_items(split_folder(Path(path), folders), num_classes)
    dataset = _timm_dataset(spec, split)
    classes = getattr(dataset, "classes", None)
    if classes is not None and not isinstance(dataset, IterableDataset):
        _same_count(spec, len(classes), num_classes)
    return _of(dataset), ""


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


def _reader(path: Path) -> Any:
    """timm's reader of a folder tree or .tar."""
    if not path.exists():
        raise BadData(f"{path} does not exist")
    if path.is_file() and path.suffix != ".tar":
        raise BadData(f"{path} is a file: a folder of images, a .tar or a timm data set is expected")
    extra: dict[str, Any] = {} if path.is_file() else {"input_key": ";".join(EXTENSIONS)}
    try:
        reader = create_dataset("", root=str(path), search_split=False, **extra).reader
        if hasattr(reader, "cache_tarfiles"):
            reader.cache_tarfiles = False  # workers would inherit an open archive with one shared position
        return reader
    except Exception as error:
        if path.is_dir():
            raise BadData(f"{path} holds no images ({' '.join(EXTENSIONS)})") from error
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise BadData(f"{path} is not a .tar of images: {reason}") from error


def split_folder(path: Path, names: Sequence[str]) -> Path:
    """The first of the folders `names` that lies in `path`; `path` where there is none."""
    return next((path / name for name in names if (path / name).is_dir()), path)


def _folder_items(path: Path, num_classes: int | None) -> tuple[Reader, str]:
    """The images of class folders with the model's labels, and one line for the user."""
    reader = _reader(path)
    names: dict[str, int] = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    labels = [int(t) for t in (reader.targets if hasattr(reader, "targets") else [t for _, t in reader.samples])]
    loose = names.get("") if path.is_dir() else None
    outside = labels.count(loose) if loose is not None else 0
    names = {name: index for name, index in names.items() if name}
    if not names:
        layout = "labels are taken from folders, PATH/<class>/<image>"
        flat = "the flat ImageNet validation set must first be sorted into folders named by wnid (n01440764, ...)"
        raise BadData(f"{path} holds {outside:,} images but no class folders: {layout}; {flat}")
    notes = [f"{outside} images outside class folders left out"] if outside else []
    wnids = all(re.fullmatch(r"n\d{8}", name) for name in names)
    subset = infer_imagenet_subset({"num_classes": num_classes}) if wnids and num_classes else None
    if subset:
        order = {wnid: index for index, wnid in enumerate(ImageNetInfo(subset).label_names())}
        unknown = sorted(set(names) - set(order))
        if unknown:
            some = ", ".join(unknown[:3])
            raise BadData(f"{path}: {len(unknown)} folders are no {subset} classes, among them {some}")
        classes = {index: order[name] for name, index in names.items()}
        notes.append(f"{len(names)} of {num_classes:,} {subset} classes, mapped by wnid")
    else:
        _same_count(str(path), len(names), num_classes)
        classes = {index: label for label, index in enumerate(sorted(names.values()))}  # timm's order, without loose
    keep = [i for i, label in enumerate(labels) if label != loose]
    return Reader(reader, keep, classes), "; ".join(notes)


def _same_count(name: str, classes: int, num_classes: int | None) -> None:
    if num_classes and classes != num_classes:
        raise BadData(f"{name} has {classes:,} classes, but the model has {num_classes:,}")


def is_prefixed(spec: str) -> bool:
    """Whether `spec` is a timm data set (`hfds/NAME`, ...) and not a folder of that name."""
    return spec.partition("/")[0].lower() in PREFIXES and "/" in spec and not Path(spec).exists()


def _of(dataset: Any) -> Items | IterableDataset:
    """timm's own data sets replace a broken image by the next, so only their reader is used; torchvision's as they are."""
    if isinstance(dataset, IterableDataset):
        return dataset
    return Reader(dataset.reader, range(len(dataset.reader))) if hasattr(dataset, "reader") else Mapped(dataset)


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
