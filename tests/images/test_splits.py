"""Claims about which folder is which split: the same for folders and archives, for learning and measuring."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from PIL import Image

from sparsify.errors import BadData
from sparsify.images import datasets, folders
from sparsify.images.splits import splits_of
from sparsify.images.trainset import trainset


def tree(root: Path, *images: str) -> Path:
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(root / name)
    return root


def archived(root: Path) -> Path:
    with tarfile.open(root.with_suffix(".tar"), "w") as tar:
        tar.add(root, ".")
    return root.with_suffix(".tar")


def of_class(part: str, classes: str = "ab") -> list[str]:
    return [f"{part}/{c}/{i}.png" for c in classes for i in range(2)]


LAYOUTS = {  # images, where to learn, where to measure
    "train, val and test": ([*of_class("train"), *of_class("val"), *of_class("test")], "train", "val"),
    "no val": ([*of_class("train"), *of_class("test")], "train", "test"),
    "other case": ([*of_class("Training"), *of_class("Testing")], "Training", "Testing"),
    "capitals": ([*of_class("TRAIN"), *of_class("Val")], "TRAIN", "Val"),
    "two names of one split": ([*of_class("train"), *of_class("validation"), *of_class("val")], "train", "val"),
    "val alone": (of_class("val"), "val", "val"),
    "train alone": (of_class("train"), "train", "train"),
    "val beside a folder of other images": ([*of_class("val"), "more/x.png"], "val", "val"),
    "val beside other class folders": ([*of_class("val"), *of_class("mine")], "val", "val"),
    "train alone, flat": (["train/0.png", "train/1.png"], "train", "train"),
    "flat": (["train/0.png", "val/0.png"], "train", "val"),
    "a level above": ([f"set/{x}" for x in (*of_class("train"), *of_class("test"))], "set/train", "set/test"),
    "a level inside": ([*of_class("train/train"), *of_class("valid/x")], "train/train", "valid/x"),
    "classes": (["a/0.png", "b/0.png"], "", ""),
    "classes, one called train": (["car/0.png", "train/0.png"], "", ""),
    "the same with folders inside": (["car/part/0.png", "train/part/0.png", "train/rest/0.png"], "", ""),
    "classes valid and invalid": (["invalid/0.png", "valid/0.png"], "", ""),
    "hidden split": (["a/0.png", "b/0.png", ".val/a/0.png"], "", ""),
    "loose images beside a folder": (["0.png", "a/b/0.png"], "", ""),
}


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_to_learn_from_and_to_measure_on(tmp_path, layout, archive):
    images, learn, measure = LAYOUTS[layout]
    root = tree(tmp_path / "x", *images)
    found = splits_of(folders.opened(archived(root) if archive else root))
    assert (found.learn, found.measure) == (learn, measure)


def test_split_without_images_is_none(tmp_path):
    tree(tmp_path, *of_class("train"), *of_class("test"))
    (tmp_path / "val").mkdir()
    assert splits_of(folders.opened(tmp_path)).measure == "test"


def test_folder_that_links_to_itself_has_no_splits(tmp_path):
    (tmp_path / "again").symlink_to(tmp_path)
    splits_of(folders.opened(tmp_path))
    with pytest.raises(BadData, match="holds no images"):
        datasets.all_images(tmp_path, "train")


@pytest.mark.parametrize("archive", [False, True])
def test_no_image_is_both_learned_from_and_measured_on(tmp_path, archive):
    root = tree(tmp_path / "x", *of_class("Train", "abc"), *of_class("Test", "abc"))
    path = archived(root) if archive else root
    inside = "" if archive else f"{root}/"

    def names(items) -> set[str]:
        return {items.name(i) if archive else items.fetch(i)[0] for i in range(len(items))}

    train, test = ({f"{inside}{part}/{c}/{i}.png" for c in "abc" for i in range(2)} for part in ("Train", "Test"))
    measured, note = datasets.class_images(path, 3, "validation", "measure")
    assert names(measured) == test and note == f"the images of {path}/Test"
    calibrated, note = datasets.all_images(path, "train")
    assert names(calibrated) == train and note == f"the images of {path}/Train"
    for wanted in (True, False):
        learned = trainset(path, 3, wanted, 0, 0)
        assert names(learned.learn) == train and learned.note == f"the images of {path}/Train"
    assert trainset(path).calibration(99, 0, lambda image: image).total == 6
