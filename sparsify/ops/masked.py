"""The same attention for training: kept keys and cell means side by side in one masked `scaled_dot_product_attention`.

    out_i = softmax([q_i.k_j, q_i.kbar_c] scale + [bias_ij, log m_ic]) [v_j, vbar_c]

bias_ij is 0 (or the logarithm of the key's size) for kept keys and -inf for dropped ones, m_ic what row i dropped of cell c
(equation 3 of `docs/design.md`). Values and gradients are those of `reference.attend` to rounding, in less than half of its
time: the kept keys and the masses have no gradient, so everything that has one is in PyTorch's own fused attention.
For every device and dtype; the kernels, if available, are faster (`cpu.kernels.trained`). On GPUs it also computes the
sparse form without gradients: nothing in it waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.ops import backends, selection
from sparsify.ops.selection import Context, Ranking
from sparsify.ops.spec import Spec


def attend(q: Tensor, k: Tensor, v: Tensor, ranking: Ranking, context: Context, spec: Spec) -> Tensor:
    """Sparse attention with tail, differentiable in q, k, v; arguments as `reference.attend`, without a mask.

    Memory: the bias of every call, [B, H, N, N + P + M] in float32, stays until the backward. Without gradients a few
    images are computed at a time, so that it has about `backends.MOST_MASKED` elements.
    Half precision: keys are chosen, counted and averaged in float32; the attention is PyTorch's in the dtype of q.

    Returns:
        [B, N, H*d], dtype of q.
    """
    B, H, N, _ = q.shape
    step = max(1, backends.MOST_MASKED // (H * N * N))
    if step >= B or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _attend(q, k, v, ranking, context, spec)
    parts = []
    for start in range(0, B, step):
        some = slice(start, start + step)
        row, col, features, shift = (t if t is None or len(t) == 1 else t[some] for t in ranking[:4])
        ranked = ranking._replace(row=row, col=col, features=features, shift=shift)
        known = Context(*(None if t is None else t[some] for t in context))
        parts.append(_attend(q[some], k[some], v[some], ranked, known, spec))
    return torch.cat(parts)


def _attend(q: Tensor, k: Tensor, v: Tensor, ranking: Ranking, context: Context, spec: Spec) -> Tensor:
    """All images at once."""
    B, H, N, d = q.shape
    wide = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    with torch.autocast(q.device.type, enabled=False):
        with torch.no_grad():
            ranking = ranking.written(q, k).to(wide)
            size = None if context.size is None else context.size.to(wide)[:, None]  # (B, 1, N)
            kept = selection.kept(ranking, context, spec)  # (B, H, N, N)
            bias = q.new_zeros((), dtype=wide) if size is None else size.log().unsqueeze(2)
            bias = torch.where(kept, bias, -torch.inf)
            cell, count = selection.cells(ranking, context, spec)
            if cell is not None:
                member = functional.one_hot(cell, count).to(wide)  # (B, H, N, m)
                if size is not None:
                    member = member * size.unsqueeze(-1)
                held = member.sum(-2, keepdim=True)  # (B, H, 1, m)
                share = (member / held.masked_fill(held == 0, 1)).mT  # (B, H, m, N)
                dropped = (~kept).to(wide) @ member  # (B, H, N, m)
                bias = torch.cat([bias, dropped.log()], -1)  # (B, H, N, N + m); cells that lost nothing: -inf
        if cell is not None:
            k, v = (torch.cat([x, (share @ x.to(wide)).to(x.dtype)], 2) for x in (k, v))  # (B, H, N + m, d)
        if q.device.type != "cpu":
            bias = bias.to(q.dtype)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=spec.scale)
    return out.transpose(1, 2).reshape(B, N, H * d)
