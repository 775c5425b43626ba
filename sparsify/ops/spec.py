"""Plain data of a sparse attention call: its constants, and what decides how long it takes."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import torch


class Spec(NamedTuple):
    """The constants of a call."""

    budget: int  # b, keys kept by each patch query row, 1 <= b <= N
    prefix: int  # P, leading prefix tokens; their rows attend densely
    tail: str  # of `tails.TAILS`, or `tails.ASSIGNED` where the caller gives every key's cell
    grid: tuple[int, int]  # rows and columns of the patch grid, for cells and tiles
    cells: tuple[int, int]  # rows and columns of the grid of cells
    tile: tuple[int, ...] = ()  # rows and columns of a tile of queries that share one key set; empty: no tiles
    scale: float = 1.0  # factor of q.k, usually 1/sqrt(d)


def budget(keep: float, n: int) -> int:
    """b = ceil(keep N - 1e-9) keys for each patch query row, at least 1 and at most N."""
    return min(n, max(1, math.ceil(keep * n - 1e-9)))


class Kind(NamedTuple):
    """What of a predictor decides how long its call takes."""

    name: str  # of the predictor's form
    rank_sum: int  # products of one score, over all heads
    rank_max: int  # the same of the head with the most
    channels: int = 0  # c of a channel reduction, 0 for none
    up_heads: int = 0  # heads of W_up, 0 for none
    coef_topk: int = 0  # sparse coefficients, 0 for none (`sparsify.config.TokenLowrank`)
    coef_threshold: float = 0.0


class Shape(NamedTuple):
    """What decides how long an attention call takes; the key of a decision of `sparsify.ops.auto`."""

    batch: int  # B
    heads: int  # H
    tokens: int  # N
    head_dim: int  # d
    dtype: torch.dtype  # of q, k, v
    device: str  # cpu or cuda
    threads: int  # of torch
    masked: bool  # whether there is an attention mask
    precision: str  # see `sparsify.nn.attention.Execution`
    sparse: str  # what would compute the sparse form, cpu or reference
    kind: Kind
    spec: Spec
    merged: bool = False  # whether keys have sizes
    placed: bool = False  # whether patch tokens have places

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
