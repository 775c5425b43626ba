"""Spends a fixed sum of ranks over the heads where the calibration images need them.

Error of a head at rank r: squared difference between its sparse and its dense output after `proj`, measured on dense
activations at all ranks. Weight of its block: the KL divergence of the model's output when that block alone is sparse,
divided by the block's error at the same rank. Weighted errors add up over heads to within the noise of the measurement
(docs/design.md), so their sum is minimised for a given sum of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

STEP = 4  # ranks move four at a time: a multiple of every vector width's share of a row of scores


def candidates(rank: int, head_dim: int) -> list[int]:
    """Ranks that a head may have around a mean of `rank`: multiples of 4 from rank/2 to 4 rank, at most d; and `rank`."""
    low, high = max(STEP, rank // 2 // STEP * STEP), min(head_dim, 4 * rank)
    ranks = {r for r in (low, 12, 16, 20, 24, 32, 48, 64, 96, 128) if low <= r <= high}
    return sorted(ranks | {min(head_dim, rank)})


def spend(
    error: Tensor, distances: Sequence[float], ranks: list[int], mean_rank: int, sparse: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """One rank for each head of each block, their mean over the heads of the sparse blocks at most `mean_rank`.

    Args:
        error: [depth, H, len(ranks)], of each head at each candidate.
        distances: KL divergence of the model's output when that block alone is sparse.
        sparse: numbers of the sparse blocks; heads of the others have `mean_rank`.
    """
    depth, heads, _ = error.shape
    at_mean = error[:, :, ranks.index(mean_rank)].sum(1)
    weights = [d / max(float(e), 1e-12) for d, e in zip(distances, at_mean, strict=True)]
    error = error * torch.tensor(weights, dtype=torch.float64)[:, None, None]
    chosen = iter(allocate(error[sparse].flatten(0, 1), ranks, mean_rank))
    return tuple(tuple(islice(chosen, heads)) if i in sparse else (mean_rank,) * heads for i in range(depth))


def allocate(error: Tensor, ranks: list[int], mean_rank: int) -> tuple[int, ...]:
    """Ranks that minimise the sum of errors with sum of ranks <= items * mean_rank, by dynamic programming.

    Args:
        error: [items, len(ranks)], weighted error of each head at each candidate, >= 0.
        ranks: candidates, ascending.

    Returns:
        One rank for each item.
    """
    error = error.flip(1).cummax(1).values.flip(1)  # more rank never counts as worse: measurement noise
    total = len(error) * mean_rank
    best = torch.zeros(total + 1, dtype=torch.float64)  # least error of the items so far with at most that sum
    choices = []
    for item in error:
        options = torch.full((len(ranks), total + 1), torch.inf, dtype=torch.float64)
        for j, r in enumerate(ranks):
            if r <= total:
                options[j, r:] = best[: total + 1 - r] + item[j]
        best, choice = options.min(0)
        choices.append(choice)
    if not torch.isfinite(best[total]):
        return (mean_rank,) * len(error)
    chosen = []
    for choice in reversed(choices):
        chosen.append(ranks[int(choice[total])])
        total -= chosen[-1]
    return tuple(reversed(chosen))
