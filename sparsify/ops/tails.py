"""Tails: what stands for the keys that a query row drops, in plain PyTorch.

A tail is a partition of the N keys into M cells. Cell c is one extra key: the mean key of the cell, counted once for
every key of the cell that the row dropped, with the cell's mean value. With S the kept keys of query i:

    out_i = ( sum_{j in S} e^{s_ij} v_j + sum_c m_ic e^{q_i.kbar_c} vbar_c )
          / ( sum_{j in S} e^{s_ij}     + sum_c m_ic e^{q_i.kbar_c} )          m_ic = dropped keys of row i in cell c

Every prefix key is a cell of its own. The patch keys are one cell (`mean`), the cells of a coarse grid over the patch
grid (`cells`), or clusters of similar keys, found for each image and head (`clusters`). kbar_c and vbar_c are the means
over the whole cell, kept keys included: measured better than over the dropped keys alone (`docs/design.md`). A key that
stands for several tokens (its size z_j, after merging) counts z_j times in means and m_ic, and z_j e^{s_ij} stands for
e^{s_ij}.
"""

from __future__ import annotations

import torch
from torch import Tensor

LLOYD_STEPS = 2  # assignments from the grid start; see docs/design.md, 'The tail', for 1, 2 and 3


def grid_cells(grid: tuple[int, int], cells: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Cell of each patch, row by row: int64 [h*w], values 0..(rows*cols - 1); at most one cell for each patch."""
    (h, w), rows, cols = grid, min(cells[0], grid[0]), min(cells[1], grid[1])
    y = torch.arange(h, device=device) * rows // h  # (h)
    x = torch.arange(w, device=device) * cols // w  # (w)
    return (y[:, None] * cols + x).flatten()  # (h*w)


def patch_grid(n: int, grid: tuple[int, int]) -> tuple[int, int]:
    """`grid` if it has n patches; else the square one; else one row of n."""
    if grid[0] * grid[1] == n:
        return grid
    side = round(n**0.5)
    return (side, side) if side * side == n else (1, n)


def cell_count(tail: str, prefix: int, grid: tuple[int, int], cells: tuple[int, int]) -> int:
    """Cells of the patch keys alone (prefix keys come on top): 0 for `none`, 1 for `mean`."""
    if tail == "none":
        return 0
    return 1 if tail == "mean" else min(cells[0], grid[0]) * min(cells[1], grid[1])


def assign(
    tail: str, f: Tensor, weight: Tensor | None, prefix: int, grid: tuple[int, int], cells: tuple[int, int],
    place: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cell of every key.

    Args:
        f: features of the keys that `clusters` compares, [B, H, N, r], float.
        weight: of each key in the means of `clusters`, [B, H, N]: its size, 0 for keys that no query may attend to;
            None: 1 each.
        prefix: P leading keys, each of them its own cell.
        place: patch of `grid` that each of the n patch keys stands on, [B, n]; None: the n of the grid in order.

    Returns:
        int64 [B, H, N], values 0..P+M-1.
    """
    B, H, N, _ = f.shape
    own = torch.arange(prefix, device=f.device).expand(B, H, prefix)
    if prefix == N:
        return own
    if tail == "mean":
        a = f.new_zeros(B, H, N - prefix, dtype=torch.int64)
    else:
        start = grid_cells(grid, cells, f.device)  # (h*w)
        m = min(cells[0], grid[0]) * min(cells[1], grid[1])
        a = (start if place is None else start[place].unsqueeze(1)).expand(B, H, -1)  # (B, H, n)
        if tail == "clusters":
            a = _lloyd(f.detach()[:, :, prefix:], a, m, None if weight is None else weight[..., prefix:])
    return torch.cat([own, a + prefix], dim=-1)


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
