"""Sparse attention as two torch.library ops: tensors in, tensors out; nothing above this folder is known here.

    sparsify::head_lowrank_attention     scores (q A_q)(k A_k)', `docs/design.md`
    sparsify::token_lowrank_attention    scores of the paper (Sparsifiner, CVPR 2023, Fig. 2)

Each holds the whole of predictor scores, top-b selection, attention over the kept keys and tail, so that a fast path
never has to write the scores out. Both have the kernels of `cpu/` (`backends.py` says where), the differentiable
reference of `reference.py` (backward recomputes it), a fake kernel (shapes for torch.compile and torch.export) and a
MACs formula (`macs.py`). Selection breaks ties by the lower key index in every backend.

`head_lowrank` and `token_lowrank` are what models call: the op, or, where nobody traces, the kernel itself, which saves
the 10 to 20 us that torch.library takes for each call and has gradients of its own (`cpu.trained`), or `masked.py`. Under
`torch.export` it is the reference inline, so that an exported program holds PyTorch's own operators only and runs where
this package is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.ops import backends, masked, reference, selection
from sparsify.ops.cpu import kernels
from sparsify.ops.spec import Spec


@torch.library.custom_op("sparsify::head_lowrank_attention", mutates_args=())
def head_lowrank_attention(
    q: Tensor, k: Tensor, v: Tensor, a_q: Tensor | None, a_k: Tensor | None, mask: Tensor | None,
    size: Tensor | None, place: Tensor | None, ranks: Sequence[int], scale: float, budget: int, prefix: int, tail: str,
    grid: Sequence[int], cells: Sequence[int],
    tile: Sequence[int], backend: str = "reference", precision: str = "input",
) -> Tensor:  # fmt: skip
    """Attention of every query over the b keys with the highest (q A_q).(k A_k), and a tail for the rest.

    Args:
        q, k, v: [B, H, N, d], any strides, one floating dtype.
        a_q, a_k: [H, d, r]; None where they are folded into `qkv` (the first r coordinates of q and k are the scores').
        mask: bool (True: may attend) or additive, broadcastable to [B, H, N, N]. Keys that it hides (-1e4 or lower is
            added) are neither kept nor in the tail; a row that may attend to nothing gives 0. What is added to the other
            keys' logits counts in the ranking too (divided by scale).
        size: tokens that each key stands for, float32 [B, N], above 0; None: 1 each. log s_j is added to the logit, and
            log s_j / scale to the score, of key j; the tail counts and averages key j s_j times.
        place: patch of `grid` that each patch token stands on, int64 [B, N - P]; None: the grid in order. Cells and
            tiles follow it.
        ranks: r of each of the H heads, 1 <= r <= d.
        scale: factor of q.k.
        budget, prefix, tail, grid, cells, tile: see `Spec`.
        backend: cpu: the kernels, where they are available and take these inputs (float32 or bfloat16 on cpu, no mask);
            else the reference computes.
        precision: input or bf16; see `Execution`. The reference computes in that of the inputs.

    Returns:
        [B, N, H*d], contiguous, dtype of q.
    """
    if _kernel(backend, q, mask):
        spec = _spec(budget, prefix, tail, grid, cells, tile)
        return kernels.head_lowrank(q, k, v, a_q, a_k, size, place, list(ranks), scale, spec, precision)
    return _head_reference(q, k, v, a_q, a_k, mask, size, place, ranks, scale, budget, prefix, tail, grid, cells, tile)


@torch.library.custom_op("sparsify::token_lowrank_attention", mutates_args=())
def token_lowrank_attention(
    q: Tensor, k: Tensor, v: Tensor, w_down: Tensor, w_up: Tensor, w_q: Tensor | None, b_q: Tensor | None,
    w_k: Tensor | None, b_k: Tensor | None, mask: Tensor | None, size: Tensor | None, place: Tensor | None, scale: float,
    coef_scale: float, coef_topk: int, coef_threshold: float, budget: int, prefix: int, tail: str, grid: Sequence[int],
    cells: Sequence[int],
    tile: Sequence[int], backend: str = "reference", precision: str = "input",
) -> Tensor:  # fmt: skip
    """Attention of every query over the b keys with the highest A~_down W_up (the paper's predictor), and a tail.

    Args:
        q, k, v: [B, H, N, d].
        w_down: [r, N], W_down; [B, 1, r, N] where tokens differ by image.
        w_up: [1 or H, r, N], W_up, already thresholded; [B, 1 or H, r, N] where tokens differ by image.
        w_q, b_q, w_k, b_k: channel reduction [c, d] and [c], shared by the heads; None for none.
        mask, size, place, scale, backend, precision: as `head_lowrank_attention`; but sizes and finite entries of the mask
            are not added to the scores, which predict what a token as a whole is given: they are in `w_up`.
        coef_scale: factor of q' K_down' before its softmax.
        coef_topk, coef_threshold, budget, prefix, tail, grid, cells, tile: see `Spec`.

    Returns:
        [B, N, H*d], contiguous, dtype of q.
    """
    if _kernel(backend, q, mask):
        spec = _spec(budget, prefix, tail, grid, cells, tile, coef_topk, coef_threshold)
        return kernels.token_lowrank(
            q, k, v, w_down, w_up, w_q, b_q, w_k, b_k, size, place, scale, coef_scale, spec, precision
        )  # fmt: skip
    return _token_reference(
        q, k, v, w_down, w_up, w_q, b_q, w_k, b_k, mask, size, place, scale, coef_scale, coef_topk, coef_threshold, budget,
        prefix, tail, grid, cells, tile,
    )  # fmt: skip


def head_lowrank(
    q: Tensor, k: Tensor, v: Tensor, a_q: Tensor | None, a_k: Tensor | None, mask: Tensor | None, size: Tensor | None,
    place: Tensor | None, ranks: tuple[int, ...], scale: float, spec: Spec, backend: str, precision: str,
) -> Tensor:  # fmt: skip
    """`head_lowrank_attention`, without torch.library where it can be; `backend`: as there, or masked."""
    way = _direct(backend, q, k, v, mask, size, (a_q, a_k))
    if way in ("kernel", "trained"):

        def call(q: Tensor, k: Tensor, v: Tensor, op: object = None) -> Any:
            return kernels.head_lowrank(q, k, v, a_q, a_k, size, place, list(ranks), scale, spec, precision, op)

        return call(q, k, v) if way == "kernel" else kernels.trained(q, k, v, size, place, scale, spec, call)
    if way == "inline":
        return _head_reference(q, k, v, a_q, a_k, mask, size, place, ranks, scale, *spec[:6])
    if way == "masked":
        with torch.no_grad():
            row, col = reference.head_lowrank_scores(q, k, a_q, a_k, ranks)  # (B, H, N, r) each
            shift = None if size is None else size.log() / scale
        return masked.attend(q, k, v, row, col, col, scale, spec, size, place, shift)
    return head_lowrank_attention(q, k, v, a_q, a_k, mask, size, place, ranks, scale, *spec[:6], backend, precision)


def token_lowrank(
    q: Tensor, k: Tensor, v: Tensor, w_down: Tensor, w_up: Tensor, w_q: Tensor | None, b_q: Tensor | None,
    w_k: Tensor | None, b_k: Tensor | None, mask: Tensor | None, size: Tensor | None, place: Tensor | None, scale: float,
    coef_scale: float, spec: Spec, backend: str, precision: str,
) -> Tensor:  # fmt: skip
    """`token_lowrank_attention`, without torch.library where it can be; `backend`: as there, or masked."""
    weights = (w_down, w_up, w_q, b_q, w_k, b_k)
    way = _direct(backend, q, k, v, mask, size, weights)
    if way in ("kernel", "trained"):

        def call(q: Tensor, k: Tensor, v: Tensor, op: object = None) -> Any:
            return kernels.token_lowrank(q, k, v, *weights, size, place, scale, coef_scale, spec, precision, op)

        return call(q, k, v) if way == "kernel" else kernels.trained(q, k, v, size, place, scale, spec, call)
    if way == "inline":
        return _token_reference(
            q, k, v, *weights, mask, size, place, scale, coef_scale, spec.coef_topk, spec.coef_threshold, *spec[:6]
        )
    if way == "masked":
        with torch.no_grad():
            down = (w_down, w_q, b_q, w_k, b_k)
            coef = reference.token_lowrank_coefficients(q, k, down, coef_scale, spec)  # (B, H, N, r)
        return masked.attend(q, k, v, coef, w_up.mT, k, scale, spec, size, place)
    return token_lowrank_attention(
        q, k, v, *weights, mask, size, place, scale, coef_scale, spec.coef_topk, spec.coef_threshold, *spec[:6], backend,
        precision,
    )  # fmt: skip


def dense(
    path: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, precision: str,
    size: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Dense attention, [B, H, M, d] and [B, H, N, d] x 2 -> [B, M, H*d].

    Args:
        path: 'sdpa' as timm computes it; 'dense-cpu' by our kernel (no mask, M = N).
        size: tokens that each key stands for, [B, N]; log s is added to the logits.
    """
    if path == "dense-cpu":
        return kernels.dense(q, k, v, scale, precision, size)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if size is not None:
        logarithm = size.log()[:, None, None].to(q.dtype)  # (B, 1, 1, N)
        if mask is None:
            mask = logarithm
        else:
            mask = torch.where(mask, logarithm, -torch.inf) if mask.dtype == torch.bool else mask + logarithm
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _direct(
    backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, size: Tensor | None, weights: Sequence[Tensor | None]
) -> str:  # fmt: skip
    """What computes a call without torch.library: 'kernel', 'trained' (with gradients), 'masked', 'inline' (an export sees
    the reference's operators); '': nothing does."""
    if torch.compiler.is_exporting():
        return "inline"
    if backend == "reference" or mask is not None or not backends.eager(q) or backends.needs_grad(size):
        return ""
    if backend == "masked":
        return "masked"
    if not _kernel(backend, q, mask):
        return ""
    if backends.needs_grad(q, k, v):
        return "trained"
    return "" if backends.needs_grad(*weights) else "kernel"  # the op: a result that wants a gradient, which is none


def _kernel(backend: str, q: Tensor, mask: Tensor | None) -> bool:
    return backend == "cpu" and backends.resolve(backend, q, mask) == "cpu"


def _like(q, *_):  # type: ignore[no-untyped-def]
    B, H, N, d = q.shape
    return q.new_empty(B, N, H * d)


def _register(op, tensors: int, differentiable) -> None:  # type: ignore[no-untyped-def]
    """Fake kernel and a backward that recomputes the reference; the first `tensors` arguments are tensors or None."""
    op.register_fake(_like)

    def setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[:tensors])
        ctx.constants = inputs[tensors:]

    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        needed = ctx.needs_input_grad
        saved = [None if t is None else t.detach().requires_grad_(needed[i]) for i, t in enumerate(ctx.saved_tensors)]
        with torch.enable_grad():
            out = differentiable(*saved, *ctx.constants[:-2])  # without backend and precision
        if not out.requires_grad:  # of the predictor alone, whose choice of keys has no gradient
            return (*[None] * tensors, *[None] * len(ctx.constants))
        wanted = [t for t in saved if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
        grads = [next(found) if t is not None and t.requires_grad else None for t in saved]
        return (*grads, *[None] * len(ctx.constants))

    op.register_autograd(backward, setup_context=setup)


def _head_reference(  # type: ignore[no-untyped-def]
    q, k, v, a_q, a_k, mask, size, place, ranks, scale, budget, prefix, tail, grid, cells, tile
):
    spec = _spec(budget, prefix, tail, grid, cells, tile)
    row, col = reference.head_lowrank_scores(q, k, a_q, a_k, ranks)  # (B, H, N, r) each
    shift = None if size is None else size.log() / scale
    return reference.attend(q, k, v, row, col, col, mask, scale, spec, size, place, shift, 1 / scale)


def _token_reference(  # type: ignore[no-untyped-def]
    q, k, v, w_down, w_up, w_q, b_q, w_k, b_k, mask, size, place, scale, coef_scale, coef_topk, coef_threshold, budget,
    prefix, tail, grid, cells, tile,
):  # fmt: skip
    spec = _spec(budget, prefix, tail, grid, cells, tile, coef_topk, coef_threshold)
    seen = k if mask is None else k * selection.alive(mask, q).unsqueeze(-1)  # hidden keys leave no trace in W_down k
    coef = reference.token_lowrank_coefficients(q, seen, (w_down, w_q, b_q, w_k, b_k), coef_scale, spec)  # (B, H, N, r)
    return reference.attend(q, k, v, coef, w_up.to(coef.dtype).mT, k, mask, scale, spec, size, place)


def _spec(budget, prefix, tail, grid, cells, tile, coef_topk=0, coef_threshold=0.0) -> Spec:  # type: ignore[no-untyped-def]
    return Spec(budget, prefix, tail, tuple(grid), tuple(cells), tuple(tile), coef_topk, coef_threshold)


_register(head_lowrank_attention, 8, _head_reference)
_register(token_lowrank_attention, 12, _token_reference)
