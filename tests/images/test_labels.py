"""Claims about which class an image has, and what a user is told of it. The same for folders and archives."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import IterableDataset
from torchvision.datasets import ImageFolder

from sparsify.errors import BadData, BadFile
from sparsify.images import datasets
from sparsify.images.preprocessing import read_class_map
from sparsify.images.trainset import trainset

ORDER = ImageNetInfo("imagenet-1k").label_names()


def tree(root: Path, *images: str) -> Path:
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(root / name)
    return root


@pytest.fixture(params=["folder", "archive"])
def read(request, tmp_path):
    """(name -> label, note) of images by the labels of a model with so many classes."""

    def labels(num_classes: int, *images: str, names: tuple[str, ...] = ()) -> tuple[dict[str, int], str]:
        path = tree(tmp_path / "x", *images)
        if request.param == "archive":
            path = tmp_path / "x.tar"
            with tarfile.open(path, "w") as tar:
                tar.add(tmp_path / "x", "x")
        items, note = datasets.class_images(path, num_classes, "", "measure", names)
        by_name = {items.name(i).removeprefix("x/"): items.fetch(i)[1] for i in range(len(items))}
        return by_name, note.removeprefix(f"the images of {path}/x; ").removeprefix(f"the images of {path}/x")

    return labels


def test_first_folder_is_the_class_and_folders_in_it_belong_to_it(read):
    found, note = read(2, "cat/part_1/0.png", "cat/part_2/a/0.png", "dog/0.png", "dog/part_1/0.png")
    assert found == {
        "cat/part_1/0.png": 0, "cat/part_2/a/0.png": 0, "dog/0.png": 1, "dog/part_1/0.png": 1,
    }  # fmt: skip
    assert note == "3 images lie in folders of class folders and belong to the class"


def test_hidden_folders_and_files_are_no_classes(read):
    found, note = read(2, "cat/0.png", "dog/0.png", ".ipynb_checkpoints/0.png", "dog/.git/0.png", ".x.png")
    assert found == {"cat/0.png": 0, "dog/0.png": 1} and note == ""


def test_folders_without_images_are_no_classes_and_named(tmp_path):
    tree(tmp_path, "cat/0.png", "dog/0.png")
    (tmp_path / "bat").mkdir()
    items, note = datasets.class_images(tmp_path, 2, "", "measure")
    assert [items.fetch(i)[1] for i in range(2)] == [0, 1] and note == "1 folders without images are no classes: bat"
    with pytest.raises(BadData, match=r"has 2 classes, but the model has 3; 1 folders without images .* bat"):
        datasets.class_images(tmp_path, 3, "", "measure")


def test_classes_are_numbered_naturally_and_it_is_said_where_torchvision_differs(read):
    found, note = read(12, *(f"{i}/0.png" for i in range(12)))
    assert found == {f"{i}/0.png": i for i in range(12)}
    assert "natural order, as by timm (2 before 10), not by letter, as by torchvision" in note


@pytest.mark.parametrize("names", [("ant", "bee"), ("1", "2"), ("01", "02", "10")])
def test_nothing_is_said_where_both_orders_are_the_same(read, names):
    assert read(len(names), *(f"{name}/0.png" for name in names))[1] == ""


def test_case_makes_the_orders_differ(read):
    found, note = read(2, "Zebra/0.png", "ant/0.png")
    assert found == {"Zebra/0.png": 1, "ant/0.png": 0} and "(ant before Zebra)" in note


def test_names_of_the_models_classes_decide(read):
    by_letter = tuple(sorted(str(i) for i in range(12)))
    found, note = read(12, *(f"{i}/0.png" for i in range(11)), names=by_letter)  # one class has no folder
    assert found == {f"{i}/0.png": by_letter.index(str(i)) for i in range(11)}
    assert note == "11 of 12 classes, by the names that the model has"
    with pytest.raises(BadData, match="1 folders are not classes of the model, among them 12"):
        read(12, "12/0.png", names=by_letter)


def test_names_that_no_folder_has_are_said(read):
    found, note = read(2, "a/0.png", "b/0.png", names=("cat", "dog"))
    assert found == {"a/0.png": 0, "b/0.png": 1} and note == "no folder has the name of a class of the model (cat, dog)"


def test_wnids_are_mapped_where_names_are_words(read):
    words = tuple(f"class {i}" for i in range(1000))
    found, note = read(1000, f"{ORDER[9]}/0.png", f"{ORDER[7]}/part/0.png", names=words)
    assert found == {f"{ORDER[9]}/0.png": 9, f"{ORDER[7]}/part/0.png": 7} and "mapped by wnid" in note


ANIMALS = ("ant", "bee", "cow")


def of_torchvision(root: Path) -> ImageFolder:
    """Three images in folders, numbered as their names sort: ant 0, bee 1, cow 2."""
    return ImageFolder(tree(root, *(f"{name}/0.png" for name in ANIMALS)))


def of_hub(root: Path) -> SimpleNamespace:
    """As `of_torchvision`, through a reader as timm has for hubs."""

    class Reader(list):
        class_to_idx: ClassVar = dict(zip(reversed(ANIMALS), (2, 1, 0), strict=True))

    return SimpleNamespace(reader=Reader([(Image.new("RGB", (8, 6)), i) for i in range(3)]))


@pytest.mark.parametrize("made", [of_torchvision, of_hub])
def test_names_of_the_models_classes_decide_in_a_data_set_too(monkeypatch, tmp_path, made):
    monkeypatch.setattr(datasets, "create_dataset", lambda *a, **k: made(tmp_path / "x"))

    def labels(names: tuple[str, ...], num_classes: int = 3) -> tuple[list[int], str]:
        items, note = datasets.class_images("hfds/x", num_classes, "", "measure", names)
        return [items.fetch(i)[1] for i in range(3)], note

    assert labels(()) == ([0, 1, 2], "")
    assert labels(("cow", "ant", "bee")) == ([1, 2, 0], "3 of 3 classes, by the names that the model has")
    assert labels(("dog", "cow", "ant", "bee"), 4)[0] == [2, 3, 1]
    found, note = labels(("owl", "cat", "dog"))
    assert found == [0, 1, 2] and "labels are the data set's own numbers" in note and "(owl, cat, dog)" in note
    with pytest.raises(BadData, match="hfds/x: 1 classes are not classes of the model, among them bee"):
        labels(("cow", "ant", "owl"))
    with pytest.raises(BadData, match="has 3 classes, but the model has 2"):
        labels((), 2)


def test_class_map_renumbers_the_digits():
    names = tuple(map(str, range(9, -1, -1)))  # nine is class 0
    (plain, _), (mapped, note) = (datasets.class_images("digits", 10, "", "measure", given) for given in ((), names))
    assert [mapped.fetch(i)[1] for i in range(20)] == [9 - plain.fetch(i)[1] for i in range(20)]
    assert note == "10 of 10 classes, by the names that the model has"


def test_names_of_the_models_classes_are_said_not_to_reach_a_stream(monkeypatch):
    class Nothing(IterableDataset):
        def __iter__(self):
            return iter(())

    monkeypatch.setattr(datasets, "create_dataset", lambda *a, **k: Nothing())
    for note in (
        datasets.labelled("wds/x", 3, lambda image: image, names=ANIMALS).note,
        trainset("wds/x", 3, labels=True, names=ANIMALS).note,
    ):
        assert "labels are the data set's own numbers" in note


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("x.txt", "owl\ncat\n dog \n\n", ("owl", "cat", "dog")),
        ("x.json", '["b", "a"]', ("b", "a")),
        ("x.json", '{"b": 1, "a": 0}', ("a", "b")),
        ("x.txt", "", None),
        ("x.txt", "a\n\nb", None),
        ("x.txt", "a\na", None),
        ("x.json", '{"a": 1, "b": 2}', None),
        ("x.json", '{"a": "0"}', None),
        ("x.json", '["a", 1]', None),
        ("x.json", "[" * 99_999, None),
        ("x.json", json.dumps("a"), None),
    ],
)
def test_class_maps(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    if expected is not None:
        assert read_class_map(tmp_path / name) == expected
        return
    with pytest.raises(BadFile, match="is no class map") as error:
        read_class_map(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
