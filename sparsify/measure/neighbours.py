"""Nearest neighbours of each image among the others of a set, by the features of a model without a classifier.

Similarity is the cosine of pooled features. With N_k(i) the k images most similar to image i, itself left out, and y labels:

    recall@k    whether some j in N_k(i) has y_j = y_i        mean over the images i that share their label with another
    overlap     |N_k(i) of dense and N_k(i) of sparse| / k    mean over all images; no labels needed
    k-NN        whether the label with the largest sum of similarities over N_k(i) is y_i

Each of the first two says nothing where k is more than half of the other images: it is left out, or k is smaller.
An image whose features are not finite is nobody's neighbour and has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 10  # k of the vote; of the overlap at most
RECALLS = (1, 5, 10)
CELLS = 2**26  # similarities held at once: 256 MiB
NOBODY = -1

Progress = Callable[[int, int], None]
"""Called with the images done, and how many there are."""


def nothing(done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


class Neighbours(NamedTuple):
    """The nearest of each image, the nearest first."""

    images: Tensor  # int64 [n, k]; `NOBODY` where there is none
    similarity: Tensor  # float32 [n, k], -1 to 1; 0 where there is none


def nearest(features: Tensor, k: int, progress: Progress = nothing) -> Neighbours:
    """The min(k, n - 1) nearest of n images by their features [n, C]."""
    n = len(features)
    f = torch.nn.functional.normalize(features.float(), dim=1)
    finite, f = f.isfinite().all(1), f.nan_to_num(0.0, 0.0, 0.0)
    indices, similarities = [], []
    step = max(1, min(1024, CELLS // n))
    for start in range(0, n, step):
        rows = torch.arange(start, min(start + step, n))
        similarity = f[rows] @ f.T  # (rows, n)
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        similarity[:, ~finite] = -torch.inf
        similarity[~finite[rows]] = -torch.inf
        best = similarity.topk(min(k, n - 1))
        nobody = best.values == -torch.inf
        indices.append(best.indices.masked_fill(nobody, NOBODY))
        similarities.append(best.values.masked_fill(nobody, 0.0))
        progress(start + len(rows), n)
    return Neighbours(torch.cat(indices), torch.cat(similarities))


def recall(near: Neighbours, labels: Tensor, k: int) -> Tensor:
    """Whether one of the k nearest has the image's label, for the images whose label another one has: bool [m], m <= n."""
    same = (labels[near.images] == labels[:, None]) & (near.images != NOBODY)  # (n, k or more)
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    return same[:, :k].any(1)[counts[index] > 1]


def overlap(one: Neighbours, other: Neighbours, k: int) -> Tensor:
    """The fraction of each image's k nearest that both have, float32 [n]."""
    a, b = one.images[:, :k], other.images[:, :k]
    both = (a[:, :, None] == b[:, None, :]).any(2) & (a != NOBODY)  # (n, k)
    return both.float().mean(1)


def vote(near: Neighbours, labels: Tensor) -> Tensor:
    """Whether the nearest, each weighted by its similarity, vote for the image's label: bool [n]."""
    classes, index = labels.unique(return_inverse=True)
    votes = torch.zeros(len(labels), len(classes))
    votes.scatter_add_(1, index[near.images.clamp_min(0)], near.similarity.clamp_min(0))
    return (votes.argmax(1) == index) & (near.images != NOBODY).any(1)


def knn(features: Tensor, labels: Tensor, k: int = NEIGHBOURS) -> float | None:
    """Accuracy (percent) of `vote` among the k nearest of features [n, C]; None for fewer than two images."""
    return None if len(features) < 2 else _mean(vote(nearest(features, k), labels))[0]


def figures(pooled: Mapping[str, Tensor], labels: Tensor, progress: Progress = nothing) -> dict[str, Any]:
    """The figures of `Evaluation` that are about neighbours.

    Args:
        pooled: features [n, C] of the models 'sparse' and, where there is one, 'dense'.
        labels: int64 [n]; -1 for none, and then no figure that needs them.
        progress: called with the rows of similarities done.
    """
    n, found = len(labels), dict[str, Any]()
    if n < 2:
        return found
    near: dict[str, Neighbours] = {}
    for name, features in pooled.items():
        near[name] = nearest(features, NEIGHBOURS, _shifted(progress, len(near) * n, len(pooled) * n))
    k = min(NEIGHBOURS, (n - 1) // 2)
    if "dense" in near and k:
        found["neighbours"] = k
        found["neighbour_overlap"], found["neighbour_overlap_error"] = _mean(overlap(near["dense"], near["sparse"], k))
    if bool((labels < 0).any()) or bool((labels == labels[0]).all()):
        return found
    for name, each in near.items():
        prefix = "dense_" if name == "dense" else ""
        found[f"{prefix}knn_top1"] = _mean(vote(each, labels))[0]
        for k in RECALLS:
            hits = recall(each, labels, k)
            if 2 * k < n and len(hits):
                found[f"{prefix}recall_at_{k}"], error = _mean(hits)
                if name == "sparse":
                    found[f"recall_at_{k}_error"] = error
    return found


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


def _mean(values: Tensor) -> tuple[float, float | None]:
    """Mean of values [n] in percent, and its standard error (None for one value)."""
    values, n = 100 * values.double(), len(values)
    return float(values.mean()), float(values.std()) / math.sqrt(n) if n > 1 else None
