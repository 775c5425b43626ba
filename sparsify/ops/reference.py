"""The specification: predicted sparse attention in plain PyTorch, differentiable, for every device and dtype.

It follows the equations and not the clock: scores are written out in full width, one chunk of query rows at a time, and
the kept keys are a mask. Half precision inputs are computed in float32. Fast paths keep the same keys and give the same
outputs to rounding. Under a tracer nothing branches on values, so that `torch.export` can follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.ops import selection
from sparsify.ops.selection import HIDDEN, Context, Ranking
from sparsify.ops.spec import Spec

CHUNK = 1 << 24  # elements of one [B, H, rows, N] tensor: 64 MB in float32


class _Keys(NamedTuple):
    """What every chunk of rows attends to."""

    k: Tensor  # [B, H, N, d]
    v: Tensor
    cell: Tensor | None  # of every key, [B, H, N], values below `cells`; None: no tail
    cells: int
    size: Tensor | None  # [B, 1, N]
    hides: bool  # whether the mask hides keys, so that every row has cell means of its own
    scale: float


def attend(q: Tensor, k: Tensor, v: Tensor, ranking: Ranking, context: Context, spec: Spec) -> Tensor:
    """Sparse attention with tail (`sparsify.ops.tails` has the equation).

    Args:
        q, k, v: [B, H, N, d].
        ranking: chooses the keys; the choice has no gradient.
        context: mask, sizes and places. Where a mask hides nothing it is a bias: a dropped key counts e^bias times in its
            cell, whose mean is that of all rows.

    Returns:
        [B, N, H*d], the layout that `proj` reads, dtype of q.
    """
    dtype = q.dtype
    ranking = ranking.written(q, k)
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v, ranking = q.float(), k.float(), v.float(), ranking.to(torch.float32)
    mask = context.mask
    bias = selection.bias_of(mask, q)
    size = None if context.size is None else context.size.to(q.dtype)[:, None]  # (B, 1, N)
    hides = bias is not None and mask is not None and _hides(mask, bias)
    keys = _Keys(k, v, *selection.cells(ranking, context, spec), size, hides, spec.scale)
    return _attend(q, keys, selection.selector(ranking, context, spec), bias).to(dtype)


def attend_chosen(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, cells: tuple[Tensor | None, int], size: Tensor | None, scale: float
) -> Tensor:
    """The same over keys and cells that are known: kept bool [B, H, N, N]; cells as `selection.cells`; size [B, N]."""
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    keys = _Keys(k, v, *cells, None if size is None else size.to(q.dtype)[:, None], False, scale)
    return _attend(q, keys, lambda rows: kept[:, :, rows], None).to(dtype)


def gradients(
    call: Callable[..., Tensor], tensors: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """For a backward: gradients of call(*tensors) where `needed`, recomputed. They are differentiable in turn where the
    backward itself is recorded (create_graph)."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [
            # a view: gradients end here also where one of the tensors was computed from another
            t if t is None else t.view_as(t) if recorded and need else t.detach().requires_grad_(need)
            for t, need in zip(tensors, needed, strict=True)
        ]
        out = call(*inputs)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not out.requires_grad:  # only the predictor was to get a gradient
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True, create_graph=recorded))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _attend(q: Tensor, keys: _Keys, kept: Callable[[slice], Tensor], bias: Tensor | None) -> Tensor:
    """All rows, chunk by chunk: [B, N, H*d]."""
    B, H, N, d = q.shape
    step = N if torch.compiler.is_compiling() else max(1, CHUNK // max(1, B * H * N))  # B may be symbolic there
    out = []
    for i in range(0, N, step):
        rows = slice(i, min(i + step, N))
        out.append(_rows(q[:, :, rows], keys, kept(rows), None if bias is None else bias[:, :, rows]))
    return torch.cat(out, dim=2).transpose(1, 2).reshape(B, N, H * d)


def _hides(mask: Tensor, bias: Tensor) -> bool:
    """Whether a mask hides any key. Under a tracer its dtype decides: an additive mask is taken for a position bias."""
    return mask.dtype == torch.bool if torch.compiler.is_compiling() else bool((bias <= HIDDEN).any())


def _rows(q: Tensor, keys: _Keys, kept: Tensor, bias: Tensor | None) -> Tensor:
    """Rows of the attention over the kept keys and the cells' means: [B, H, rows, d].

    q: [B, H, rows, d]; kept: bool [B, H, rows, N]; bias: additive mask of these rows.
    """
    k, v, size, scale = keys.k, keys.v, keys.size, keys.scale
    if bias is not None and size is not None:
        bias = bias + size.log().unsqueeze(2)
    plain = (q @ k.mT) * scale  # (B, H, rows, N)
    logits = plain
    if bias is not None:
        logits = plain + bias
    elif size is not None:
        logits = plain + size.log().unsqueeze(2)
    kept_logits = logits.masked_fill(~kept, -torch.inf)
    if keys.cell is None:
        top = kept_logits.amax(-1, keepdim=True).detach()
        e = (kept_logits - top.masked_fill(top == -torch.inf, 0)).exp()
        return (e / _nonzero(e.sum(-1, keepdim=True))) @ v
    member = (keys.cell.unsqueeze(-1) == torch.arange(keys.cells, device=k.device)).to(q.dtype)  # (B, H, N, m)
    if not keys.hides:
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
    tail = t @ v_mean if not keys.hides else ((t / held) @ member.mT * share) @ v
    return (e @ v + tail) / z


def _nonzero(z: Tensor) -> Tensor:
    return z.masked_fill(z == 0, 1)  # a row that may attend to nothing gives 0, as scaled_dot_product_attention does
