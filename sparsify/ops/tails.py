"""Tails: what stands for the keys that a query row drops, in plain PyTorch.

A tail is a partition of the N keys into M cells. Cell c is one extra key: the mean key of the cell, counted once for
every key of the cell that the row dropped, with the cell's mean value. With S the kept keys of query i:

    out_i = ( sum_{j in S} e^{s_ij} v_j + sum_c m_ic e^{q_i.kbar_c} vbar_c )
          / ( sum_{j in S} e^{s_ij}     + sum_c m_ic e^{q_i.kbar_c} )          m_ic = dropped keys of row i in cell c

Every prefix key is a cell of its own; a `Tail` assigns the patch keys. kbar_c and vbar_c are the means over the whole cell,
kept keys included: measured better than over the dropped keys alone (`docs/design.md`). A key that stands for several tokens
(its size z_j, after merging) counts z_j times in means and m_ic, and z_j e^{s_ij} stands for e^{s_ij}.

A new tail is a new subclass of `Tail`, handed to an attention as `Sparsity.tail`. The kernels know those of `TAILS`; another
one assigns its cells in PyTorch, and the reference computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.ops.spec import Grid

LLOYD_STEPS = 2  # assignments from the grid start; see docs/design.md, 'The tail', for 1, 2 and 3
ASSIGNED = "assigned"  # the tail of a call whose cells are given (`selection.Context.cell`)


class Tail:
    """A partition of the patch keys into cells.

    Attributes:
        name: in configurations and messages.
        stands_for_dropped_keys: False: there is no tail, dropped keys are lost.
    """

    name: str
    stands_for_dropped_keys = True

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return self.name

    def count(self, grid: Grid, cells: Grid) -> int:
        """M, cells of the patch keys alone.

        Args:
            grid: rows and columns of patches.
            cells: rows and columns of cells that the configuration asks for.
        """
        raise NotImplementedError

    def cell(self, features: Tensor, weight: Tensor | None, grid: Grid, cells: Grid, place: Tensor | None) -> Tensor:
        """Cell of every patch key: int64 [B, H, n], values 0..M-1. Arguments as `assign`, of the n patch keys alone."""
        raise NotImplementedError

    def assign(
        self, features: Tensor, weight: Tensor | None, prefix: int, grid: Grid, cells: Grid, place: Tensor | None = None
    ) -> Tensor:
        """Cell of every key: each prefix key its own, then those of `cell`.

        Args:
            features: of the keys, which `clusters` compares, [B, H, N, r], float.
            weight: of each key in means, [B, H, N]: its size, 0 for keys that no query may attend to; None: 1 each.
            prefix: P.
            grid, cells: see `count`.
            place: patch of `grid` that each of the n patch keys stands on, [B, n]; None: the n of the grid in order.

        Returns:
            int64 [B, H, N], values 0..P+M-1.
        """
        B, H, N, _ = features.shape
        if prefix == 0:  # nothing to join: a program with empty tensors cannot be read by some runtimes
            return self.cell(features, weight, grid, cells, place)
        first = torch.arange(prefix, device=features.device).expand(B, H, prefix)
        if prefix == N:
            return first
        weight = None if weight is None else weight[..., prefix:]
        return torch.cat([first, self.cell(features[:, :, prefix:], weight, grid, cells, place) + prefix], dim=-1)


class NoTail(Tail):
    """Dropped keys are lost, as in the paper."""

    name = "none"
    stands_for_dropped_keys = False

    def count(self, grid: Grid, cells: Grid) -> int:
        return 0


class Mean(Tail):
    """One cell of all patch keys."""

    name = "mean"

    def count(self, grid: Grid, cells: Grid) -> int:
        return 1

    def cell(self, features: Tensor, weight: Tensor | None, grid: Grid, cells: Grid, place: Tensor | None) -> Tensor:
        return features.new_zeros(features.shape[:3], dtype=torch.int64)


class GridCells(Tail):
    """The cells of a coarse grid over the patch grid; at most one cell for each patch."""

    name = "cells"

    def count(self, grid: Grid, cells: Grid) -> int:
        return min(cells[0], grid[0]) * min(cells[1], grid[1])

    def cell(self, features: Tensor, weight: Tensor | None, grid: Grid, cells: Grid, place: Tensor | None) -> Tensor:
        start = grid_cells(grid, cells, features.device)  # (h*w)
        return (start if place is None else start[place].unsqueeze(1)).expand(*features.shape[:2], -1)  # (B, H, n)


class Clusters(GridCells):
    """Clusters of similar keys, found for each image and head from the cells of the grid (Lloyd's algorithm)."""

    name = "clusters"

    def cell(self, features: Tensor, weight: Tensor | None, grid: Grid, cells: Grid, place: Tensor | None) -> Tensor:
        start = super().cell(features, weight, grid, cells, place)
        return _lloyd(features.detach(), start, self.count(grid, cells), weight)


TAILS: dict[str, Tail] = {tail.name: tail for tail in (NoTail(), Mean(), GridCells(), Clusters())}
"""The tails that the op and its kernels know, by name."""


def known(tail: Tail) -> bool:
    """Whether the op computes this tail; else its cells are given to it (`ASSIGNED`)."""
    return TAILS.get(tail.name) == tail


def grid_cells(grid: Grid, cells: Grid, device: torch.device | None = None) -> Tensor:
    """Cell of each patch, row by row: int64 [h*w], values 0..(rows*cols - 1); at most one cell for each patch."""
    (h, w), rows, cols = grid, min(cells[0], grid[0]), min(cells[1], grid[1])
    y = torch.arange(h, device=device) * rows // h  # (h)
    x = torch.arange(w, device=device) * cols // w  # (w)
    return (y[:, None] * cols + x).flatten()  # (h*w)


def patch_grid(n: int, grid: Grid) -> Grid:
    """`grid` if it has n patches; else the square one; else one row of n."""
    if grid[0] * grid[1] == n:
        return grid
    side = round(n**0.5)
    return (side, side) if side * side == n else (1, n)


def _lloyd(f: Tensor, a: Tensor, m: int, weight: Tensor | None) -> Tensor:
    """LLOYD_STEPS assignments to the nearest cell mean; ties go to the lower cell; an empty cell takes nothing more."""
    weight = torch.ones_like(f[..., :1]) if weight is None else weight.to(f.dtype).unsqueeze(-1)  # (B, H, n, 1)
    f = f.nan_to_num()
    for _ in range(LLOYD_STEPS):
        total, count = cell_sums(f * weight, a, m), cell_sums(weight, a, m)
        centre = total / count.masked_fill(count == 0, 1)  # (B, H, m, r)
        distance = centre.square().sum(-1).unsqueeze(-2) - 2 * f @ centre.mT  # (B, H, n, m), less |f|^2
        a = distance.masked_fill(count.mT == 0, torch.inf).argmin(-1)
    return a


def cell_sums(x: Tensor, a: Tensor, m: int) -> Tensor:
    """Sums of x [B, H, N, d] over the keys of each cell: [B, H, m, d]."""
    out = x.new_zeros(*x.shape[:2], m, x.shape[-1])
    return out.scatter_add(2, a.unsqueeze(-1).expand_as(x), x)
