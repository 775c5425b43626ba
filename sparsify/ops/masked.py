"""The same attention for training: kept keys and cell means side by side in one masked `scaled_dot_product_attention`.

    out_i = softmax([q_i.k_j, q_i.kbar_c] scale + [bias_ij, log m_ic]) [v_j, vbar_c]

bias_ij is 0 (or the logarithm of the key's size) for kept keys and -inf for dropped ones, m_ic what row i dropped of cell c
(equation 3 of `docs/design.md`). Values and gradients are those of `reference.attend` to rounding, in less than half of its
time: the kept keys and the masses have no gradient, so everything that has one is in PyTorch's own fused attention.
For every device and dtype; where there are kernels, theirs are faster (`cpu.trained`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.ops import selection, tails
from sparsify.ops.spec import Spec


def attend(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor, col: Tensor, f: Tensor, scale: float, spec: Spec,
    size: Tensor | None = None, place: Tensor | None = None, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sparse attention with tail, differentiable in q, k, v; arguments as `reference.attend`, without a mask.

    Memory: the bias of every call, [B, H, N, N + P + M] in float32, stays until the backward.
    Half precision: keys are chosen, counted and averaged in float32; the attention is PyTorch's in the dtype of q.

    Returns:
        [B, N, H*d], dtype of q.
    """
    B, H, N, d = q.shape
    P = min(spec.prefix, N)
    wide = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    with torch.autocast(q.device.type, enabled=False):
        with torch.no_grad():
            row, col, f = (t.to(wide) for t in (row, col, f))
            own = None if size is None else size.to(wide)[:, None]  # (B, 1, N)
            kept = choose(row, col, spec, P, place, None if shift is None else shift.to(wide))  # (B, H, N, N)
            bias = q.new_zeros((), dtype=wide) if own is None else own.log().unsqueeze(2)
            bias = torch.where(kept, bias, -torch.inf)
            if spec.tail != "none":
                weight = None if own is None else own.expand(B, H, N)
                a = tails.assign(spec.tail, f, weight, P, _grid(spec, N - P, place), _pair(spec.cells), place)
                member = functional.one_hot(a, int(a.max()) + 1).to(wide)  # (B, H, N, m)
                if own is not None:
                    member = member * own.unsqueeze(-1)
                held = member.sum(-2, keepdim=True)  # (B, H, 1, m)
                share = (member / held.masked_fill(held == 0, 1)).mT  # (B, H, m, N)
                dropped = (~kept).to(wide) @ member  # (B, H, N, m)
                bias = torch.cat([bias, dropped.log()], -1)  # (B, H, N, N + m); cells that lost nothing: -inf
        if spec.tail != "none":
            k, v = (torch.cat([x, (share @ x.to(wide)).to(x.dtype)], 2) for x in (k, v))  # (B, H, N + m, d)
        if q.device.type != "cpu":
            bias = bias.to(q.dtype)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).reshape(B, N, H * d)


def choose(row: Tensor, col: Tensor, spec: Spec, prefix: int, place: Tensor | None, shift: Tensor | None) -> Tensor:
    """The keys that each query keeps, of scores row @ col' [B, H, N, N]: bool [B, H, N, N], all for the prefix rows."""
    scores = row @ col.mT
    if shift is not None:
        scores = scores + shift[:, None, None]
    N = scores.shape[2]
    if spec.tile and prefix < N:
        grid = _grid(spec, N - prefix, place)
        scores = selection.pool_tiles(scores[:, :, prefix:], grid, _pair(spec.tile), place)
        return functional.pad(selection.top_b(scores, spec.budget), (0, 0, prefix, 0), value=True)
    kept = selection.top_b(scores, spec.budget)
    kept[:, :, :prefix] = True
    return kept


def _grid(spec: Spec, n: int, place: Tensor | None) -> tuple[int, int]:
    return _pair(spec.grid) if place is not None else tails.patch_grid(n, _pair(spec.grid))


def _pair(x: tuple[int, ...]) -> tuple[int, int]:
    return x[0], x[1]
