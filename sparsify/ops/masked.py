"""The same attention for training: kept keys and cell means side by side in one masked `scaled_dot_product_attention`.

    out_i = softmax([q_i.k_j, q_i.kbar_c] scale + [bias_ij, log m_ic]) [v_j, vbar_c]

bias_ij is 0 (or the logarithm of the key's size) for kept keys and -inf for dropped ones, m_ic what row i dropped of cell c
(equation 3 of `docs/design.md`). Values and gradients are those of `reference.attend` to rounding, in a third of its time:
the kept keys and the masses have no gradient, so everything that has one is in PyTorch's own fused attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.ops import reference, tails
from sparsify.ops.spec import Spec


def attend(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor, col: Tensor, f: Tensor, scale: float, spec: Spec,
    size: Tensor | None = None, place: Tensor | None = None, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sparse attention with tail, differentiable in q, k, v; arguments as `reference.attend`, without a mask.

    Memory: the bias of every call, [B, H, N, N + P + M] in the dtype of q, stays until the backward.

    Returns:
        [B, N, H*d], dtype of q.
    """
    B, H, N, d = q.shape
    P = min(spec.prefix, N)
    with torch.no_grad():
        kept = choose(row.detach(), col.detach(), spec, P, place, shift)  # (B, H, N, N)
        own = None if size is None else size.to(torch.float32)[:, None, None]  # (B, 1, 1, N)
        bias = torch.zeros((), device=q.device) if own is None else own.log()
        bias = torch.where(kept, bias, -torch.inf)  # (B, H, N, N)
        if spec.tail != "none":
            grid = (
                (spec.grid[0], spec.grid[1])
                if place is not None
                else tails.patch_grid(N - P, (spec.grid[0], spec.grid[1]))
            )
            weight = None if own is None else own[:, :, 0].expand(B, H, N)
            cells = (spec.cells[0], spec.cells[1])
            a = tails.assign(spec.tail, f.detach().float(), weight, P, grid, cells, place)  # (B, H, N)
            member = functional.one_hot(a, int(a.max()) + 1).to(torch.float32)  # (B, H, N, m)
            if own is not None:
                member = member * own.mT
            held = member.sum(-2, keepdim=True)  # (B, H, 1, m)
            dropped = (~kept).to(torch.float32) @ member  # (B, H, N, m)
            share = (member / held.masked_fill(held == 0, 1)).mT.to(k.dtype)  # (B, H, m, N)
            bias = torch.cat([bias, dropped.log()], -1)  # (B, H, N, N + m)
    if spec.tail != "none":
        k, v = torch.cat([k, share @ k], 2), torch.cat([v, share @ v], 2)  # (B, H, N + m, d)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)
    return out.transpose(1, 2).reshape(B, N, H * d)


def choose(
    row: Tensor, col: Tensor, spec: Spec, prefix: int, place: Tensor | None, shift: Tensor | None
) -> Tensor:  # fmt: skip
    """The keys that each query keeps, of scores row @ col' [B, H, N, N]: bool [B, H, N, N], all for the prefix rows."""
    scores = row.float() @ col.float().mT
    if shift is not None:
        scores = scores + shift.float()[:, None, None]
    if spec.tile and prefix < scores.shape[2]:
        N = scores.shape[2]
        grid = (
            (spec.grid[0], spec.grid[1])
            if place is not None
            else tails.patch_grid(N - prefix, (spec.grid[0], spec.grid[1]))
        )
        pooled = reference.pool_tiles(scores[:, :, prefix:], grid, (spec.tile[0], spec.tile[1]), place)
        kept = functional.pad(reference.top_b(pooled, spec.budget), (0, 0, prefix, 0), value=True)
    else:
        kept = reference.top_b(scores, spec.budget)
        kept[:, :, :prefix] = True
    return kept


__all__ = ["attend", "choose"]
