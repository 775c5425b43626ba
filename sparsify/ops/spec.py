"""The constants of one sparse attention call, flat enough for a torch.library schema, and how it is to be executed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    pass
import json
from typing import Any

import torch


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


class Kind(NamedTuple):
    """What of a predictor decides how long its call takes.

    Attributes:
        name: head, head-folded or token.
        rank_sum, rank_max: over the heads; token-lowrank has one rank.
        channels: c of the channel reduction, 0 for none.
        up_heads: heads of W_up, 0 where there is none.
    """

    name: str
    rank_sum: int
    rank_max: int
    channels: int = 0
    up_heads: int = 0


class Shape(NamedTuple):
    """What decides how long an attention call takes; the key of a decision.

    Attributes:
        batch, heads, tokens, head_dim: B, H, N, d.
        dtype: of q, k, v; device: cpu or cuda; threads: of torch.
        masked: whether there is an attention mask.
        precision: see `Execution`.
        sparse: what would compute the sparse form, cpu or reference.
        kind, spec: predictor and constants.
        merged, placed: whether keys have sizes, and whether patch tokens have places.
    """

    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype
    device: str
    threads: int
    masked: bool
    precision: str
    sparse: str
    kind: Kind
    spec: Spec
    merged: bool = False
    placed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The same, fit for JSON."""
        plain = self._asdict() | {"dtype": str(self.dtype).removeprefix("torch.")}
        plain |= {"kind": self.kind._asdict(), "spec": self.spec._asdict()}
        return json.loads(json.dumps(plain))

    def text(self) -> str:
        """One line that no other shape has."""
        return json.dumps(self.as_dict(), separators=(",", ":"))
