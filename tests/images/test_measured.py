"""Which images are measured on: with labels or without, and which of them where a limit is given."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import IterableDataset

from helpers.image_folders import class_folders
from sparsify.errors import BadLabels, UsageError
from sparsify.images import datasets, measured
from sparsify.images.measured import EvaluationImages
from sparsify.images.sampling import spread

groups = st.lists(st.sampled_from("abcde"), min_size=1, max_size=60)


def to_tensor(image):
    return torch.full((1, 1, 1), float(image.getpixel((0, 0))[0]))


def opened(path, num_classes=2, **how):
    return measured.opened(EvaluationImages(str(path), **how), num_classes, to_tensor)


def labels(found):
    return [int(y) for _, batch in found.batches for y in batch]


@given(groups, st.integers(1, 70), st.integers(0, 99), st.integers(1, 4))
@settings(deadline=None)
def test_images_are_spread_over_the_groups(of, n, seed, together):
    drawn = spread(of, n, seed, together)
    assert drawn == spread(of, n, seed, together) == sorted(set(drawn)) and len(drawn) == min(n, len(of))
    assert set(drawn) <= set(range(len(of))) and set(drawn) <= set(spread(of, n + 1, seed, together))
    taken, there = Counter(of[i] for i in drawn), Counter(of)
    left = [taken[g] for g in there if taken[g] < there[g]]
    assert not left or max(taken.values()) - min(left) <= together


def test_another_seed_draws_others():
    assert len({tuple(spread("a" * 20 + "b" * 20, 6, seed)) for seed in range(20)}) > 10


def test_images_directly_in_a_folder_have_no_labels(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    found = opened(tmp_path)
    assert not found.labelled and labels(found) == [-1] * 3 and "has no class folders" in found.batches.note
    (tmp_path / "empty").mkdir()  # names no class
    assert not opened(tmp_path).labelled
    with pytest.raises(BadLabels, match="no class folders") as error:
        opened(tmp_path, labels=True)
    assert "no_labels" not in str(error.value)
    inside = class_folders(tmp_path, "ab", 2)
    found = opened(inside)
    assert found.labelled and labels(found) == [0, 0, 1, 1] and "3 images outside" in found.batches.note


def test_folders_that_are_no_classes_are_an_error_that_offers_no_labels(tmp_path):
    class_folders(tmp_path, "abc", 2)
    for num_classes in (2, 1000):
        with pytest.raises(BadLabels, match=r"3 classes, but the model has .*; no_labels compares with dense"):
            opened(tmp_path, num_classes)
    found = opened(tmp_path, 1000, labels=False)
    assert not found.labelled and labels(found) == [-1] * 6 and found.batches.note == ""


def test_a_split_is_chosen_without_labels_too(tmp_path):
    for split, n in (("train", 3), ("val", 2)):
        (tmp_path / split).mkdir()
        for i in range(n):
            Image.new("RGB", (8, 8)).save(tmp_path / split / f"{i}.png")
    assert opened(tmp_path).batches.total == 2


def test_a_limit_spreads_over_classes_or_folders_and_is_said(tmp_path):
    class_folders(tmp_path, "abcd", 5)
    found = opened(tmp_path, 4, limit=8, seed=1)
    assert Counter(labels(found)) == dict.fromkeys(range(4), 2) and found.drawn_from == 20
    assert found.batches.note == "8 of 20 images, drawn by seed 1 over 4 of 4 classes"
    loose = opened(tmp_path, 1000, limit=2, labels=False)
    assert labels(loose) == [-1, -1] and loose.batches.note.endswith("over 2 of 4 folders")
    of_features = opened(tmp_path, 0, limit=10)  # whole classes: neighbours of a class are looked for
    assert sorted(Counter(labels(of_features)).values()) == [5, 5]
    everything = opened(tmp_path, 4, limit=20)
    assert everything.drawn_from is None and everything.batches.note == "" and everything.batches.total == 20
    with pytest.raises(UsageError, match="limit 0"):
        EvaluationImages(str(tmp_path), limit=0)


def test_a_limit_knows_the_labels_of_data_sets(monkeypatch):
    assert Counter(labels(opened("digits", 10, limit=30))) == dict.fromkeys(range(10), 3)
    assert set(labels(opened("digits", 10, limit=5, labels=False))) == {-1}

    class Source(list):
        targets = (0, 0, 0, 0, 1, 1)

    picture = Image.new("RGB", (2, 2))
    for source, expected in ((Source((picture, y) for y in Source.targets), [0, 1]), ([(picture, 0)] * 6, [0, 0])):
        monkeypatch.setattr(datasets, "create_dataset", lambda *a, source=source, **k: source)
        assert labels(opened("hfds/x", 2, limit=2)) == expected


def test_of_a_stream_the_first_images_are_taken(monkeypatch):
    class Endless(IterableDataset):
        def __iter__(self):
            return ((Image.new("RGB", (2, 2)), 1) for _ in iter(int, 1))

    monkeypatch.setattr(datasets, "create_dataset", lambda *a, **k: Endless())
    found = opened("wds/x", limit=3)
    assert labels(found) == [1] * 3 and found.batches.note == "at most the first 3 images"
    assert labels(opened("wds/x", limit=3, labels=False)) == [-1] * 3
