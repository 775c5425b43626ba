"""Recall, overlap and votes of nearest neighbours against loops that count them one by one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.measure import neighbours
from sparsify.measure.neighbours import NOBODY, figures, nearest, overlap, recall, vote

sizes = st.integers(2, 14)
seeds = st.integers(0, 10_000)


def drawn(seed, n, channels=3, classes=3):
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(2, n, channels, generator=rng)
    return features[0], features[1], torch.randint(0, classes, (n,), generator=rng)


def by_hand(features, k):
    """The k nearest of each image, by loops over float64."""
    unit = [[float(v) / math.hypot(*map(float, row)) for v in row] for row in features]
    found = []
    for i, a in enumerate(unit):
        order = sorted((-sum(x * y for x, y in zip(a, b, strict=True)), j) for j, b in enumerate(unit) if j != i)
        found.append([j for _, j in order[:k]])
    return found


@given(seeds, sizes, st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_nearest_recall_and_overlap_are_those_counted_by_hand(seed, n, k):
    one, other, labels = drawn(seed, n)
    near, far = nearest(one, k), nearest(other, k)
    k = min(k, n - 1)
    a, b, y = by_hand(one, k), by_hand(other, k), labels.tolist()
    assert near.images.tolist() == a and far.images.tolist() == b
    hits = [any(y[j] == y[i] for j in a[i]) for i in range(n) if y.count(y[i]) > 1]
    assert recall(near, labels, k).tolist() == hits
    assert overlap(near, far, k).tolist() == pytest.approx([len({*a[i]} & {*b[i]}) / k for i in range(n)])
    votes = [max((sum(max(0.0, float(s)) for j, s in zip(a[i], near.similarity[i], strict=True) if y[j] == c), -c)
                 for c in set(y)) for i in range(n)]  # fmt: skip
    assert vote(near, labels).tolist() == [-c == y[i] for i, (_, c) in enumerate(votes)]


@given(seeds, st.integers(3, 20))
@settings(max_examples=30, deadline=None)
def test_the_same_features_share_all_neighbours_and_order_does_not_matter(seed, n):
    one, other, labels = drawn(seed, n, channels=5)
    same = figures({"dense": one, "sparse": 3 * one}, labels)
    assert same["neighbour_overlap"] == 100 and same["neighbour_overlap_error"] == 0
    assert all(same[f"dense_{name}"] == same[name] for name in same if f"dense_{name}" in same)
    before = figures({"dense": one, "sparse": other}, labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    after = figures({"dense": one[order], "sparse": other[order]}, labels[order])
    assert before.keys() == after.keys() and all(after[name] == pytest.approx(before[name]) for name in before)
    recalls = [before[f"recall_at_{k}"] for k in neighbours.RECALLS if f"recall_at_{k}" in before]
    assert recalls == sorted(recalls)


def test_no_figure_that_says_nothing():
    one, other, labels = drawn(0, 12)
    assert "neighbours" not in figures({"dense": one[:2], "sparse": other[:2]}, labels[:2])  # one other image
    assert figures({"sparse": one[:1]}, labels[:1]) == {}
    found = figures({"dense": one, "sparse": other}, torch.tensor([0, 1] * 6))
    assert found["neighbours"] == 5 and "recall_at_5" in found and "recall_at_10" not in found
    for y in (torch.full((12,), -1), torch.zeros(12, dtype=torch.int64)):  # no labels, or one class
        assert set(figures({"dense": one, "sparse": other}, y)) == {
            "neighbours", "neighbour_overlap", "neighbour_overlap_error",
        }  # fmt: skip
    assert not [
        name for name in figures({"sparse": one}, torch.arange(12)) if "recall" in name
    ]  # each alone in its class


def test_an_image_that_is_not_finite_is_nobodys_neighbour(monkeypatch):
    features = torch.tensor([[1.0, 0], [math.nan, 0], [1, 0.1], [math.inf, 1], [-1, 0.2]])
    whole = nearest(features, 3)
    assert whole.images.tolist() == [
        [2, 4, NOBODY], [NOBODY] * 3, [0, 4, NOBODY], [NOBODY] * 3, [2, 0, NOBODY],
    ]  # fmt: skip
    assert not overlap(whole, whole, 2)[[1, 3]].any() and not recall(whole, torch.zeros(5), 3)[[1, 3]].any()
    monkeypatch.setattr(neighbours, "CELLS", 10)  # two rows at a time
    seen = []
    parts = nearest(features, 3, lambda done, total: seen.append((done, total)))
    assert torch.equal(parts.images, whole.images) and seen == [(2, 5), (4, 5), (5, 5)]


def test_errors_are_those_of_the_mean_over_images():
    one, _, labels = drawn(3, 11)
    hits = recall(nearest(one, 10), labels, 1).double()
    found = figures({"sparse": one}, labels)
    assert found["recall_at_1"] == pytest.approx(100 * float(hits.mean()))
    assert found["recall_at_1_error"] == pytest.approx(100 * float(hits.std()) / math.sqrt(len(hits)))
