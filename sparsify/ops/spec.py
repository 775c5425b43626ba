"""Plain data of a sparse attention call: its constants, and what decides how long it takes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch

Grid = tuple[int, int]  # rows and columns


class Spec(NamedTuple):
    """The constants of a call. Budgets and cells are of each head, or one for all heads."""

    budgets: tuple[int, ...]  # b, keys kept by each patch query row, 1 <= b <= N
    prefix: int  # P, leading prefix tokens; their rows attend densely
    tail: str  # of `tails.TAILS`, or `tails.ASSIGNED` where the caller gives every key's cell
    grid: Grid  # the patches, for cells and tiles
    cells: tuple[Grid, ...]  # the grid of cells
    tile: tuple[int, ...] = ()  # rows and columns of a tile of queries that share one key set; empty: no tiles
    scale: float = 1.0  # factor of q.k, usually 1/sqrt(d)

    @classmethod
    def uniform(
        cls,
        budget: int,
        prefix: int,
        tail: str,
        grid: Grid,
        cells: Grid,
        tile: tuple[int, ...] = (),
        scale: float = 1.0,
    ) -> Spec:
        """The same budget and cells in all heads."""
        return cls((budget,), prefix, tail, grid, (cells,), tile, scale)

    def head(self, h: int) -> Spec:
        """The constants of one head, counted from 0."""
        return self._replace(budgets=(of_head(self.budgets, h),), cells=(of_head(self.cells, h),))

    def flat(self) -> tuple[tuple[int, ...], int, str, Grid, tuple[int, ...], tuple[int, ...], float]:
        """As the arguments of a torch op, which takes lists of numbers."""
        sides = tuple(side for grid in self.cells for side in grid)
        return self.budgets, self.prefix, self.tail, self.grid, sides, self.tile, self.scale

    def typical(self, N: int) -> Spec:
        """One budget and one number of cells that take about as long: the means, the budget to 1/64 of N."""
        if len(self.budgets) == len(self.cells) == 1:
            return self
        step, cells = max(1, N // 64), [rows * columns for rows, columns in self.cells]
        budget = min(N, step * round(sum(self.budgets) / len(self.budgets) / step) or 1)
        return self._replace(budgets=(budget,), cells=((1, round(sum(cells) / len(cells))),))

    @classmethod
    def of_flat(cls, budgets: Any, prefix: int, tail: str, grid: Any, cells: Any, tile: Any, scale: float) -> Spec:
        """The inverse of `flat`."""
        pairs = tuple(zip(cells[::2], cells[1::2], strict=True))
        return cls(tuple(budgets), prefix, tail, tuple(grid), pairs, tuple(tile), scale)


T = TypeVar("T")


def of_head(values: Sequence[T], h: int) -> T:
    """The value of head h of values that are of each head, or one for all."""
    return values[h if len(values) > 1 else 0]


def shortest(values: Sequence[T]) -> tuple[T, ...]:
    """Values of each head; one for all where they are the same."""
    return tuple(values[:1] if len(set(values)) == 1 else values)


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
    device: str  # cpu, cuda:0
    threads: int  # of torch
    masked: bool  # whether there is an attention mask
    precision: str  # see `sparsify.nn.attention.Execution`
    sparse: str  # what would compute the sparse form, cpu, masked or reference
    kind: Kind
    spec: Spec  # `Spec.typical`
    merged: bool = False  # whether keys have sizes
    placed: bool = False  # whether patch tokens have places
    graph: bool = False  # whether the call is replayed from a CUDA graph

    @property
    def device_type(self) -> str:
        """cpu or cuda."""
        return self.device.partition(":")[0]

    def as_dict(self) -> dict[str, Any]:
        """The same, fit for JSON; the scale follows from head_dim and is left out, and two GPUs of a name are alike."""
        kind, spec = self.kind._asdict(), self.spec._asdict()
        del spec["scale"]
        spec |= {name: kind.pop(name) for name in ("coef_topk", "coef_threshold")}
        plain = self._asdict() | {"dtype": str(self.dtype).removeprefix("torch."), "kind": kind, "spec": spec}
        plain["device"] = self.device_type
        if not self.graph:  # as files have it that were written before there were graphs
            del plain["graph"]
        return json.loads(json.dumps(plain))

    def text(self) -> str:
        """One line that no other shape has."""
        return json.dumps(self.as_dict(), separators=(",", ":"))
