"""The specification: predicted sparse attention in plain PyTorch, differentiable, for every device and dtype.

It follows the equations and not the clock: scores are written out in full width, one chunk of query rows at a time, and
the kept keys are a mask. Half precision inputs are computed in float32. Fast paths keep the same keys and give the same
outputs to rounding. Nothing branches on values while somebody traces, so that `torch.export` can go through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.ops import tails
from sparsify.ops.selection import HIDDEN, _bias, alive, pool_tiles, top_b
from sparsify.ops.spec import Spec

CHUNK = 1 << 24  # elements of one [B, H, rows, N] tensor: 64 MB in float32


def rank_mask(ranks: Sequence[int], like: Tensor) -> Tensor:
    """1 for the first ranks[h] coordinates of head h, else 0: [H, 1, max(ranks)], dtype and device of `like`."""
    r = torch.tensor(tuple(ranks), device=like.device)[:, None, None]  # (H, 1, 1)
    return (torch.arange(max(ranks), device=like.device) < r).to(like.dtype)


def head_lowrank_scores(
    q: Tensor, k: Tensor, a_q: Tensor | None, a_k: Tensor | None, ranks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The r coordinates whose product ranks the keys: (q A_q) [B, H, N, r] and (k A_k) [B, H, N, r].

    a_q, a_k: [H, d, r]; None where they are folded into `qkv`, so that the first r coordinates are the projections.
    ranks: r of each head; r above is the largest, the keys' coordinates past a head's own are 0.
    """
    if a_q is None or a_k is None:
        r = max(ranks)
        return q[..., :r], k[..., :r] * rank_mask(ranks, k)
    return q @ a_q.to(q.dtype), k @ a_k.to(k.dtype)


def token_lowrank_coefficients(q: Tensor, k: Tensor, p: tuple[Tensor | None, ...], scale: float, spec: Spec) -> Tensor:
    """A~_down: sparse basis coefficients of the paper's predictor, [B, H, N, r].

        softmax(q' (W_down k')' scale), then the coef_topk largest (or those above the threshold), not renormalised.

    p: W_down [r, N], or [B, 1, r, N] for tokens of each image; W_q', b_q', W_k', b_k' ([c, d] and [c], shared by the
        heads) or None.
    """
    w_down, w_q, b_q, w_k, b_k = p
    assert w_down is not None
    if w_q is not None and w_k is not None:
        q = torch.nn.functional.linear(q, w_q.to(q.dtype), None if b_q is None else b_q.to(q.dtype))  # (B, H, N, c)
        k = torch.nn.functional.linear(k, w_k.to(k.dtype), None if b_k is None else b_k.to(k.dtype))  # (B, H, N, c)
    k_down = w_down.to(k.dtype) @ k  # (B, H, r, c)
    coef = ((q @ k_down.mT) * scale).softmax(-1)  # (B, H, N, r)
    if 0 < spec.coef_topk < coef.shape[-1]:
        coef = coef * top_b(coef, spec.coef_topk)
    elif spec.coef_threshold > 0:
        coef = coef * (coef > spec.coef_threshold)
    return coef


def attend(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor, col: Tensor, f: Tensor, mask: Tensor | None, scale: float, spec: Spec,
    size: Tensor | None = None, place: Tensor | None = None, shift: Tensor | None = None, ranked: float = 0.0,
) -> Tensor:  # fmt: skip
    """Sparse attention with tail; the scores that rank the keys are row @ col'.

    Args:
        q, k, v: [B, H, N, d].
        row, col: [B, H, N, r] and [B, H, N, r] (head-lowrank), or coefficients [B, H, N, r] and W_up' [H, N, r].
        f: features of the keys for `clusters`, [B, H, N, *].
        mask: bool (True: may attend) or additive, broadcastable to [B, H, N, N]; None for none. Where it hides nothing it
            is a bias: a dropped key counts e^bias times in its cell, whose mean is that of all rows.
        scale: factor of q.k, usually 1/sqrt(d).
        ranked: factor of the mask in the scores; 0: only what it hides counts there.
        size: tokens that each key stands for, [B, N], above 0; its logarithm is added to the logits; None: 1 each.
        place: patch of `spec.grid` that each of the N - P patch tokens stands on, [B, N - P]; None: the grid's own
            order (`tails.patch_grid`).
        shift: added to the scores of every row, [B, N]: what sizes mean for the ranking.

    Returns:
        [B, N, H*d], the layout that `proj` reads, dtype of q.
    """
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v, row, col, f = (t.float() for t in (q, k, v, row, col, f))
    B, H, N, d = q.shape
    P = min(spec.prefix, N)
    bias = None if mask is None else _bias(mask, q.dtype).expand(B, H, N, N)
    weight = None if mask is None else alive(mask, q)  # (B, H, N)
    if size is not None:
        size = size.to(q.dtype)[:, None]  # (B, 1, N)
        weight = size.expand(B, H, N) if weight is None else weight * size
    ranking = None if bias is None else torch.where(bias > HIDDEN, bias * ranked, bias)
    if shift is not None:
        ranking = shift.to(q.dtype)[:, None, None] + (0 if ranking is None else ranking)
    hides = bias is not None and mask is not None and _hides(mask, bias)
    grid = (spec.grid[0], spec.grid[1])
    if place is None:
        grid = tails.patch_grid(N - P, grid)
    a, cells = None, (spec.cells[0], spec.cells[1])
    m = P + tails.cell_count(spec.tail, P, grid, cells)
    if spec.tail != "none":
        a = tails.assign(spec.tail, f, weight, P, grid, cells, place)  # (B, H, N), values below m
    if spec.tile and P < N:
        scores = _biased(row @ col.mT, ranking)[:, :, P:]
        keep_all = top_b(pool_tiles(scores, grid, (spec.tile[0], spec.tile[1]), place), spec.budget)
    step = N if torch.compiler.is_compiling() else max(1, CHUNK // (B * H * N))  # B may be symbolic there
    out = []
    for i in range(0, N, step):
        rows = slice(i, min(i + step, N))
        dense = torch.arange(rows.start, rows.stop, device=q.device) < P  # (rows)
        bias_i = None if bias is None else bias[:, :, rows]
        if spec.tile and P < N:
            padded = torch.nn.functional.pad(keep_all, (0, 0, P, 0), value=True)
            kept = padded[:, :, rows]
        else:
            ranking_i = ranking if ranking is None or ranking.shape[2] == 1 else ranking[:, :, rows]
            kept = top_b(_biased(row[:, :, rows] @ col.mT, ranking_i), spec.budget)
        kept = kept | dense[:, None]  # prefix rows attend to every key
        out.append(_rows(q[:, :, rows], k, v, kept, bias_i, hides, size, a, m, scale))
    return torch.cat(out, dim=2).transpose(1, 2).reshape(B, N, H * d).to(dtype)


def _hides(mask: Tensor, bias: Tensor) -> bool:
    """Whether a mask hides any key. While somebody traces, its kind says it: what is added to logits is a position bias."""
    return mask.dtype == torch.bool if torch.compiler.is_compiling() else bool((bias <= HIDDEN).any())


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    bias: Tensor | None,
    hides: bool,
    size: Tensor | None,
    a: Tensor | None,
    m: int,
    scale: float,
) -> Tensor:
    """Rows of the attention over the kept keys and the cells' means: [B, H, rows, d]."""
    if bias is not None and size is not None:
        bias = bias + size.log().unsqueeze(2)
    plain = (q @ k.mT) * scale  # (B, H, rows, N)
    logits = _biased(plain, size.log().unsqueeze(2) if bias is None and size is not None else bias)
    kept_logits = logits.masked_fill(~kept, -torch.inf)
    if a is None:
        top = kept_logits.amax(-1, keepdim=True).detach()
        e = (kept_logits - top.masked_fill(top == -torch.inf, 0)).exp()
        return (e / _nonzero(e.sum(-1, keepdim=True))) @ v
    member = (a.unsqueeze(-1) == torch.arange(m, device=a.device)).to(q.dtype)  # (B, H, N, m)
    if not hides:
        sized = member if size is None else member * size.unsqueeze(-1)
        held = _nonzero(sized.sum(-2, keepdim=True).mT)  # (B, H, m, 1)
        k_mean, v_mean = sized.mT @ k / held, sized.mT @ v / held  # (B, H, m, d)
        share, each = ((~kept).to(q.dtype), sized) if bias is None else (bias.exp().masked_fill(kept, 0), member)
        dropped = share @ each  # (B, H, rows, m); a bias has the sizes in it
        tail_logits = (q @ k_mean.mT) * scale  # (B, H, rows, m)
    else:  # every row has its own cell means: over the keys it may attend to, weighted with e^bias
        assert bias is not None
        share = bias.exp()  # (B, H, rows, N)
        held = (share @ member).clamp_min(torch.finfo(q.dtype).tiny)
        dropped = share.masked_fill(kept, 0) @ member
        tail_logits = (share * plain) @ member / held
    tail_logits = tail_logits.masked_fill(dropped == 0, -torch.inf)
    top = torch.maximum(kept_logits.amax(-1, keepdim=True), tail_logits.amax(-1, keepdim=True)).detach()
    top = top.masked_fill(top == -torch.inf, 0)
    e, t = (kept_logits - top).exp(), dropped * (tail_logits - top).exp()
    z = _nonzero(e.sum(-1, keepdim=True) + t.sum(-1, keepdim=True))
    tail = t @ v_mean if not hides else ((t / held) @ member.mT * share) @ v
    return (e @ v + tail) / z


def _nonzero(z: Tensor) -> Tensor:
    return z.masked_fill(z == 0, 1)  # a row that may attend to nothing gives 0, as scaled_dot_product_attention does


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
