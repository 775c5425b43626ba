"""The constants of one sparse attention call, flat enough for a torch.library schema, and how it is to be executed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sparsify.ops.auto import Chooser


class Spec(NamedTuple):
    """Everything about a call that is not a tensor.

    Attributes:
        budget: b, keys kept by each patch query row, 1 <= b <= N.
        prefix: P, leading prefix tokens; their rows attend densely.
        tail: none, mean, cells or clusters (`sparsify.ops.tails`).
        grid: rows and columns of the patch grid, for cells and tiles.
        cells: rows and columns of the grid of cells.
        tile: rows and columns of a tile of queries that share one key set; empty for one set for each query.
        coef_topk: coefficients kept in each row (token-lowrank); 0 keeps all.
        coef_threshold: coefficients up to this value become 0, used when coef_topk is 0.
    """

    budget: int
    prefix: int
    tail: str
    grid: tuple[int, ...]
    cells: tuple[int, ...]
    tile: tuple[int, ...] = ()
    coef_topk: int = 0
    coef_threshold: float = 0.0


def budget(keep: float, n: int) -> int:
    """b = ceil(keep N - 1e-9) keys for each patch query row, at least 1 and at most N."""
    return min(n, max(1, math.ceil(keep * n - 1e-9)))


@dataclass(frozen=True)
class Execution:
    """How an attention module computes; plain configuration, no part of the model's file or state dict.

    Attributes:
        backend: auto, cpu or reference (`sparsify.ops.backends`); auto is cpu where the kernels are available.
        precision: input, or bf16: float32 tensors with bfloat16 storage of q, k, v inside the kernels.
        dense_fallback: dense attention may be computed instead of the sparse form where `choose` measured it faster;
            never in training, nor where a gradient is needed, nor once the model or a copy of it has been in train mode
            (`Chooser.withdraw`). For models whose weights are the dense original's.
        choose: measures and remembers; None: no dense fallback.
    """

    backend: str = "auto"
    precision: str = "input"
    dense_fallback: bool = False
    choose: Chooser | None = None
