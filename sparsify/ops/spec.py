"""Plain data of a sparse attention call: its constants, and what decides how long it takes."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import torch


class Spec(NamedTuple):
    """The constants of a call.

    Attributes:
        budget: b, keys kept by each patch query row, 1 <= b <= N.
        prefix: P, leading prefix tokens; their rows attend densely.
        tail: a name of `sparsify.ops.tails.TAILS`, or `tails.ASSIGNED` where the caller gives every key's cell.
        grid: rows and columns of the patch grid, for cells and tiles.
        cells: rows and columns of the grid of cells.
        tile: rows and columns of a tile of queries that share one key set; empty: each query has its own.
        scale: factor of q.k, usually 1/sqrt(d).
    """

    budget: int
    prefix: int
    tail: str
    grid: tuple[int, int]
    cells: tuple[int, int]
    tile: tuple[int, ...] = ()
    scale: float = 1.0


def budget(keep: float, n: int) -> int:
    """b = ceil(keep N - 1e-9) keys for each patch query row, at least 1 and at most N."""
    return min(n, max(1, math.ceil(keep * n - 1e-9)))


class Kind(NamedTuple):
    """What of a predictor decides how long its call takes.

    Attributes:
        name: of the predictor's form.
        rank_sum, rank_max: products of one score, summed and largest over the heads.
        channels: c of a channel reduction, 0 for none.
        up_heads: heads of W_up, 0 where there is none.
        coef_topk, coef_threshold: sparse coefficients, 0 where there are none (`sparsify.config.TokenLowrank`).
    """

    name: str
    rank_sum: int
    rank_max: int
    channels: int = 0
    up_heads: int = 0
    coef_topk: int = 0
    coef_threshold: float = 0.0


class Shape(NamedTuple):
    """What decides how long an attention call takes; the key of a decision of `sparsify.ops.auto`.

    Attributes:
        batch, heads, tokens, head_dim: B, H, N, d.
        dtype: of q, k, v; device: cpu or cuda; threads: of torch.
        masked: whether there is an attention mask.
        precision: see `sparsify.nn.attention.Execution`.
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
        """The same, fit for JSON; the scale follows from head_dim and is left out."""
        kind, spec = self.kind._asdict(), self.spec._asdict()
        del spec["scale"]
        spec |= {name: kind.pop(name) for name in ("coef_topk", "coef_threshold")}
        plain = self._asdict() | {"dtype": str(self.dtype).removeprefix("torch."), "kind": kind, "spec": spec}
        return json.loads(json.dumps(plain))

    def text(self) -> str:
        """One line that no other shape has."""
        return json.dumps(self.as_dict(), separators=(",", ":"))
