"""Spends a fixed sum of ranks over the blocks where the calibration images need them.

Error of block l at rank r: mean squared difference between its sparse and its dense output (after `proj`), measured on
dense activations for every rank at once. Its weight: the KL divergence of the model's output when block l alone is
sparse, divided by its error at the same rank. Their product adds up over blocks to within the noise of the measurement
(docs/design.md), so ranks are moved, four at a time, to where they lower the sum most.
"""

from __future__ import annotations

from torch import Tensor

STEP = 4  # ranks move four at a time: a multiple of every vector width's share of a row of scores


def candidates(rank: int, head_dim: int) -> list[int]:
    """Ranks that a block may get around a mean of `rank`: multiples of 4 from rank/2 to 4 rank, at most d."""
    low, high = max(STEP, rank // 2 // STEP * STEP), min(head_dim, 4 * rank)
    ranks = {r for r in (low, 12, 16, 20, 24, 32, 48, 64, 96, 128) if low <= r <= high}
    return sorted(ranks | {min(head_dim, rank)})


def allocate(error: Tensor, ranks: list[int], mean_rank: int) -> tuple[int, ...]:
    """Rank of each block that minimises the sum of errors with sum of ranks <= depth * mean_rank.

    Args:
        error: [depth, len(ranks)], weighted error of each block at each candidate, >= 0.
        ranks: candidates, ascending.

    Returns:
        depth ranks, exact by dynamic programming over the sum of ranks.
    """
    depth = error.shape[0]
    error = error.flip(1).cummax(1).values.flip(1)  # more rank never counts as worse: measurement noise
    total = depth * mean_rank
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for block in range(depth):
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (value, chosen) in best.items():
            for j, r in enumerate(ranks):
                s = spent + r
                if s > total:
                    break
                v = value + float(error[block, j])
                if s not in grown or v < grown[s][0]:
                    grown[s] = (v, (*chosen, r))
        best = grown
    if not best:
        return (mean_rank,) * depth
    return min(best.items(), key=lambda item: (item[1][0], item[0]))[1][1]
