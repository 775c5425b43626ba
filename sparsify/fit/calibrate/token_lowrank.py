"""The paper's token-lowrank predictor in closed form: W_down by pooling, W_up by ridge regression.

W_down averages the patch grid into r cells, so that the coefficients A~_down say how much a query attends to each part of
the image. With C [rows, r] the coefficients of all patch queries and A [rows, N] the dense attention of the same rows,

    W_up = (C'C + lambda I)^{-1} C'A

per head (or over all heads), both Gram matrices summed batch by batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.nn.predictor import TokenLowrankPredictor
from sparsify.ops.tails import grid_cells

RIDGE = 1e-3  # lambda as a fraction of the mean diagonal of C'C


def pooling(rank: int, prefix: int, grid: tuple[int, int]) -> Tensor:
    """W_down [rank, P + h*w]: row-wise averages over at most `rank` cells of the patch grid; unused rows are 0."""
    # rows and columns of the finest grid of at most `rank` cells, as square as possible
    options = [(a, min(rank // a, grid[1])) for a in range(1, min(rank, grid[0]) + 1)]
    cells = max(options, key=lambda o: (o[0] * o[1], -abs(math.log(o[0] / o[1]))))
    cell = grid_cells(grid, cells)  # (n)
    member = torch.nn.functional.one_hot(cell, rank).float().T  # (rank, n)
    member = member / member.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([torch.zeros(rank, prefix), member], dim=1)


class BasisFit:
    """The ridge regression of W_up of one block: running C'C [H, r, r] and C'A [H, r, N], float64."""

    def __init__(self, predictor: TokenLowrankPredictor, heads: int) -> None:
        self.predictor = predictor
        r, n = predictor.w_down.shape
        self.gram = torch.zeros(heads, r, r, dtype=torch.float64)
        self.cross = torch.zeros(heads, r, n, dtype=torch.float64)

    def add(self, q: Tensor, k: Tensor, scale: float, prefix: int, bias: Tensor | None = None) -> None:
        """Adds a batch: q, k [B, H, N, d]; bias of the logits, [1, H, N, N]."""
        p = self.predictor
        coef = p.coefficients(q, k)[:, :, prefix:]  # (B, H, n, r)
        logits = (q[:, :, prefix:] @ k.mT) * scale  # (B, H, n, N)
        attention = (logits if bias is None else logits + bias[:, :, prefix:]).softmax(-1)
        self.gram += torch.einsum("bhnr,bhns->hrs", coef, coef).double().cpu()
        self.cross += torch.einsum("bhnr,bhnm->hrm", coef, attention).double().cpu()

    @torch.no_grad()
    def solve(self) -> None:
        """Writes W_up into the predictor; does nothing where it is W_down."""
        p = self.predictor
        if p.w_up is None:
            return
        gram, cross = self.gram, self.cross
        if p.knobs["shared_heads"]:
            gram, cross = gram.sum(0, keepdim=True), cross.sum(0, keepdim=True)
        diagonal = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-12)
        w_up = torch.linalg.solve(gram + RIDGE * diagonal * torch.eye(gram.shape[-1], dtype=gram.dtype), cross)
        p.w_up.copy_(w_up)
