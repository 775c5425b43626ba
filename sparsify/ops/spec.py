"""The constants of one sparse attention call, flat enough for a torch.library schema."""

from __future__ import annotations

import math
from typing import NamedTuple


class Spec(NamedTuple):
    """Everything about a call that is not a tensor.

    Attributes:
        budget: b, keys kept by each patch query row, 1 <= b <= N.
        prefix: P, leading prefix tokens; their rows attend densely.
        tail: none, mean, cells or clusters (`sparsify.ops.tails`).
        grid: rows and columns of the patch grid, for cells and tiles.
        cells: rows and columns of the grid of cells.
        tile: rows and columns of a tile of queries that share one key set; empty for one set for each query.
        score_scale: factor of the predictor's scores (it matters to `tile`, whose rows pass a softmax).
        coef_topk: coefficients kept in each row (token-lowrank); 0 keeps all.
        coef_threshold: coefficients up to this value become 0, used when coef_topk is 0.
    """

    budget: int
    prefix: int
    tail: str
    grid: tuple[int, ...]
    cells: tuple[int, ...]
    tile: tuple[int, ...] = ()
    score_scale: float = 1.0
    coef_topk: int = 0
    coef_threshold: float = 0.0


def budget(keep: float, n: int) -> int:
    """b = ceil(keep N - 1e-9) keys for each patch query row, at least 1 and at most N."""
    return min(n, max(1, math.ceil(keep * n - 1e-9)))
