"""Claims about the images to learn from and those held back. Folders are made here; nothing is downloaded."""

from __future__ import annotations

import pickle
import shutil
import tarfile
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import IterableDataset

from sparsify.errors import BadData
from sparsify.images import datasets
from sparsify.images.loaders import Decoded, ImageBatches, Items, StreamPart
from sparsify.images.trainset import TrainSet, trainset

ORDER = ImageNetInfo("imagenet-1k").label_names()


def picture(path: Path, red: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (red, 0, 0)).save(path)


def flat(root: Path, count: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(root / f"{i}.png", i)
    return root


def names(items: Items | StreamPart) -> list[str]:
    assert not isinstance(items, StreamPart)
    return [items.name(i) for i in range(len(items))]


def labels(items: Items | StreamPart) -> list[int]:
    assert not isinstance(items, StreamPart)
    return [items.fetch(i)[1] for i in range(len(items))]


def unlabelled(path: Path | str, hold_back: float = 0.25, seed: int = 0) -> TrainSet:
    return trainset(path, None, False, seed, hold_back)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


# the two parts


@given(total=st.integers(2, 5000), hold_back=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**40))
def test_parts_divide_the_images_and_the_held_back_are_at_most_1024(total, hold_back, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "create_dataset", lambda *a, **k: list(range(total)))
        both = trainset("hfds/x", None, False, seed, hold_back)
    learn, held = both.learn, both.held
    assert sorted([*learn.indices, *held.indices]) == list(range(total))
    assert list(learn.indices) == sorted(learn.indices)
    assert len(held) == (min(1024, max(1, round(hold_back * total)), total - 1) if hold_back else 0)


def test_the_division_is_the_same_for_a_seed_and_another_for_another(tmp_path):
    flat(tmp_path, 40)
    first, again, other = unlabelled(tmp_path), unlabelled(tmp_path), unlabelled(tmp_path, seed=1)
    assert names(first.held) == names(again.held) and names(first.learn) == names(again.learn)
    assert len(first.held) == 10 and set(names(first.held)) != set(names(other.held))


# labels


def test_without_labels_every_label_is_minus_one_and_images_lie_at_any_depth(tmp_path):
    picture(tmp_path / "0.png")
    picture(tmp_path / "a/b/1.png")
    picture(tmp_path / "c/2.png")
    found = trainset(tmp_path, 1000, False, 0, 0.3)
    assert labels(found.learn) == [-1, -1] and labels(found.held) == [-1] and not found.stream


def test_class_folders_give_labels_in_order_of_their_names(tmp_path):
    for name in ("cat", "dog", "owl"):
        flat(tmp_path / name, 2)
    found = trainset(tmp_path, 3, True, 0, 0)
    assert labels(found.learn) == [0, 0, 1, 1, 2, 2] and len(found.held) == 0
    with pytest.raises(BadData, match="has 3 classes, but the model has 10") as error:
        trainset(tmp_path, 10, True, 0, 0)
    one_line(error)


def test_wnid_folders_are_mapped(tmp_path):
    for i in (7, 207):
        picture(tmp_path / ORDER[i] / "0.png")
    found = trainset(tmp_path, 1000, True, 0, 0)
    assert labels(found.learn) == [7, 207] and found.note == "2 of 1,000 imagenet-1k classes, mapped by wnid"


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("name", ["train", "training"])
def test_of_an_imagenet_root_the_train_folder_is_taken_and_told(tmp_path, name, wanted):
    for part, count in ((name, 3), ("val", 2)):
        for c in ("a", "b"):
            flat(tmp_path / part / c, count)
    found = trainset(tmp_path, 2, wanted, 0, 0)
    assert len(found.learn) == 6 and found.note == f"the images of {tmp_path / name}"
    assert found.name == str(tmp_path)
    assert found.digest == trainset(tmp_path / name, 2, wanted, 0, 0).digest


def test_flat_train_folder_beside_a_validation_folder_is_taken(tmp_path):
    flat(tmp_path / "train", 3)
    flat(tmp_path / "val", 2)
    assert len(unlabelled(tmp_path, 0).learn) == 3


@pytest.mark.parametrize("wanted", [True, False])
def test_class_called_train_is_a_class(tmp_path, wanted):
    for name in ("car", "train"):
        flat(tmp_path / name, 2)
    assert len(trainset(tmp_path, 2, wanted, 0, 0).learn) == 4


def test_digits_is_its_train_split():
    found, named, test = (trainset(x, 10, True, 0, 0.1) for x in ("digits", "digits:train", "digits:test"))
    assert len(found.learn) + len(found.held) == 1200 and len(found.held) == 120
    assert set(labels(found.held)) == set(range(10))
    assert found.digest == named.digest != test.digest
    with pytest.raises(BadData, match="has 10 classes, but the model has 1,000"):
        trainset("digits", 1000, True, 0, 0.1)


def test_tar_that_was_read_here_is_read_by_workers_too(tmp_path):
    for i in range(40):
        picture(tmp_path / f"f/{i}.png")
        Image.effect_noise((64, 64), 60).save(tmp_path / f"f/{i}.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "f", "f")
    found = unlabelled(tmp_path / "x.tar", 0.5)
    assert len(found.learn) == len(found.held) == 20
    to = datasets.transform({"input_size": (3, 8, 8), "interpolation": "bilinear", "crop_pct": 1.0})
    alone, workers = (torch.cat(list(ImageBatches(Decoded(found.held, to), 1, w))) for w in (0, 2))
    assert torch.equal(alone, workers)
    pickle.dumps(found.learn)  # for workers that are spawned: no open file


# digest


def test_digest_knows_the_names_but_not_where_they_lie(tmp_path):
    flat(tmp_path / "here", 4)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    digest = unlabelled(tmp_path / "here").digest
    assert unlabelled(tmp_path / "there", 0.5, 3).digest == digest and len(digest) == 64
    (tmp_path / "there/0.png").rename(tmp_path / "there/00.png")
    assert unlabelled(tmp_path / "there").digest != digest
    picture(tmp_path / "here/4.png")
    assert unlabelled(tmp_path / "here").digest != digest


# errors


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_nothing_to_read_gives_one_line(tmp_path, kind, wanted):
    path = tmp_path / "x"
    if kind == "empty":
        (path / "cat").mkdir(parents=True)
    elif kind == "file":
        path.write_text("no images")
    with pytest.raises(BadData, match="x") as error:
        trainset(path, 2, wanted, 0, 0.1)
    one_line(error)


def test_one_image_cannot_be_divided(tmp_path):
    flat(tmp_path, 1)
    with pytest.raises(BadData, match=r"holds 1 image: at least 2 .* set hold_back to 0") as error:
        unlabelled(tmp_path)
    one_line(error)
    assert len(unlabelled(tmp_path, 0).learn) == 1
    picture(tmp_path / "second.png")
    assert len(unlabelled(tmp_path, 0.99).learn) == 1


def test_empty_data_set_is_an_error(monkeypatch):
    monkeypatch.setattr(datasets, "create_dataset", lambda *a, **k: [])
    with pytest.raises(BadData, match="hfds/x holds no images") as error:
        unlabelled("hfds/x", 0)
    one_line(error)


# streams


class Shards(IterableDataset):
    """As timm's streams: pairs of image and label, a reader that gives each process its own part."""

    def __init__(self) -> None:
        self.reader = types.SimpleNamespace(dist_rank=1, dist_num_replicas=2)

    def __iter__(self):
        return ((Image.new("RGB", (4, 4), (i % 256, 0, 0)), i) for i in range(300))


class Counted(Shards):
    def __len__(self) -> int:
        return 300


@pytest.mark.parametrize(
    "source, hold_back, first", [(Counted, 0.1, 30), (Counted, 0.0, 0), (Shards, 0.1, 256), (Shards, 0.0, 0)]
)
def test_stream_holds_back_its_first_images(monkeypatch, source, hold_back, first):
    stream = source()
    asked = []
    monkeypatch.setattr(datasets, "create_dataset", lambda name, **k: asked.append(k["split"]) or stream)
    found = trainset("wds/shards:/x", 300, True, 0, hold_back)
    assert found.stream and asked == ["train"]
    for _ in range(2):
        assert [label for _, label in found.held] == list(range(first))
        assert [label for _, label in found.learn] == list(range(first, 300))
    assert {label for _, label in trainset("wds/shards:/x", None, False, 0, hold_back).learn} == {-1}
    assert stream.reader.dist_num_replicas == 1 and stream.reader.dist_rank == 0  # each process reads all
