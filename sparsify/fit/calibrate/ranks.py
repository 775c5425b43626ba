"""Spends a fixed sum of ranks over the heads where the calibration images need them.

Error of a head at rank r: squared difference between its sparse and its dense output after `proj`, measured on dense
activations at all ranks. Weight of its block: the KL divergence of the model's output when that block alone is sparse,
divided by the block's error at the same rank. Weighted errors add up over heads to within the noise of the measurement
(docs/design.md), so their sum is minimised for a given sum of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 4  # ranks move four at a time: a multiple of every vector width's share of a row of scores


def candidates(rank: int, head_dim: int) -> list[int]:
    """Ranks that a head may have around a mean of `rank`: multiples of 4 from rank/2 to 4 rank, at most d; and `rank`."""
    low, high = max(STEP, rank // 2 // STEP * STEP), min(head_dim, 4 * rank)
    ranks = {r for r in (low, 12, 16, 20, 24, 32, 48, 64, 96, 128) if low <= r <= high}
    return sorted(ranks | {min(head_dim, rank)})


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
