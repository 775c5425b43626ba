"""Fewer tokens on a GPU, as torch.library ops: importance, a round of merging, a stage of evit.

Callers ask `takes` or `ranks` first: elsewhere the reference computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.ops.gpu.available import LARGEST_HEAD, MOST_CHANNELS, MOST_TOKENS, usable
from sparsify.ops.gpu.launching import launch, op, power_of_two, precision, tiles


def takes(x: Tensor, prefix: int) -> bool:
    """Whether the ops compute the tokens x [B, P + n, C]."""
    return x.shape[2] <= MOST_CHANNELS and 1 <= x.shape[1] - prefix <= MOST_TOKENS and usable(x)


def ranks(q: Tensor, k: Tensor, bias: Tensor | None) -> bool:
    """Whether `attention_importance` computes a call with q and k [B, H, N, d]."""
    return bias is None and q.shape[3] <= LARGEST_HEAD and q.dtype == k.dtype and usable(q, k)


# ---- importance ----


@op(launches=1)
def fitted_importance(x: Tensor, weights: Tensor, size: Tensor | None, prefix: int, least: float) -> Tensor:
    """`sparsify.nn.importance.fitted_importance` of the patch tokens: x [B, P + n, C] -> float32 [B, n].

    weights: [C + 1]; size: float32 [B, P + n] or None; prefix: P; least: lower bound of the result.
    """
    from sparsify.ops.gpu import importance_kernels as kernels

    B, N, C = x.shape
    n, rows = N - prefix, 4
    out = x.new_empty(B, n, dtype=torch.float32)
    constants = dict(C=C, CP=power_of_two(C), SIZED=size is not None, ROWS=rows)
    tensors = (x.contiguous(), weights.contiguous(), _or(size, out), out)
    launch(kernels.fitted, (tiles(n, rows), B), (*tensors, n, prefix, least), x.device, **constants, num_warps=4)
    return out


@fitted_importance.fake
def _(x: Tensor, weights: Tensor, size: Tensor | None, prefix: int, least: float) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - prefix, dtype=torch.float32)


@op(launches=2)
def attention_importance(
    q: Tensor, k: Tensor, size: Tensor | None, scale: float, rows: int, prefix: int, least: float
) -> Tensor:
    """`sparsify.nn.importance.attention_importance` without a bias: q, k [B, H, N, d] -> float32 [B, n].

    size: float32 [B, N] or None; rows, prefix: see there; least: lower bound of the result.
    """
    from sparsify.ops.gpu import importance_kernels as kernels

    q, k = _rows(q), _rows(k)
    B, H, N, d = q.shape
    n, ranking, block = N - prefix, H * max(rows, 1), 128
    logits, lse = (q.new_empty(B, ranking, *last, dtype=torch.float32) for last in ((N,), ()))
    out = q.new_empty(B, n, dtype=torch.float32)
    strides = (*q.stride()[:3], *k.stride()[:3])
    constants = dict(D=d, DP=power_of_two(d), ROWS=rows, SIZED=size is not None, BLOCK=64)
    arguments = (q, k, _or(size, lse), logits, lse, scale, *strides, N)
    launch(kernels.logits, (ranking, B), arguments, q.device, **constants, num_warps=4)
    arguments = (logits, lse, out, N, prefix, ranking, least)
    launch(kernels.attended, (tiles(n, block), B), arguments, q.device, BLOCK=block, num_warps=4)
    return out


@attention_importance.fake
def _(q: Tensor, k: Tensor, size: Tensor | None, scale: float, rows: int, prefix: int, least: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2] - prefix, dtype=torch.float32)


# ---- merging ----


@op(launches=4)
def merge_tokens(
    x: Tensor, I: Tensor, size: Tensor | None, place: Tensor | None, prefix: int, m: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A round of merging from n tokens to m < n: `matching` and the means of `sparsify.nn.merging`.

    Args:
        x: [B, P + n, C]; I: float32 [B, n]; size: float32 [B, P + n], None: 1 each; place: int64 [B, n], None: 0 to n - 1.
        prefix: P; count: how many tokens search their nearest (`sparsify.nn.merging.candidates`), at least n - m.

    Returns:
        x [B, P + m, C], I [B, m], size [B, P + m] and place [B, m] of the remaining tokens; group [B, n] (`matching`).
    """
    from sparsify.ops.gpu import token_kernels as kernels

    B, N, C = x.shape
    n, device = N - prefix, x.device
    r, x, I = n - m, x.contiguous(), I.contiguous()
    rising, order, near = (x.new_empty(B, each, dtype=torch.int32) for each in (n, n, count))
    inverse, cost = (x.new_empty(B, each, dtype=torch.float32) for each in (n, count))
    keep, group = (x.new_empty(B, each, dtype=torch.int64) for each in (m, n))
    tensors: tuple[Tensor, ...] = (x, I, rising, order, inverse)
    launch(kernels.rank, (tiles(n, 16), B), (*tensors, n, prefix), device, C=C, BC=128, ROWS=16, BLOCK=128, num_warps=4)
    tensors = (x, I, order, inverse, near, cost)
    tile = dict(BC=16 if x.dtype == torch.float32 else 64, ROWS=64, BLOCK=64, num_warps=4, num_stages=3)
    grid, how = (tiles(count, 64), B), precision(x)
    launch(kernels.nearest, grid, (*tensors, n, prefix, count), device, C=C, PRECISION=how, **tile)
    NP = power_of_two(n)
    tensors = (rising, order, near, cost, keep, group)
    steps = (r - 1).bit_length()  # a chain has at most r tokens
    launch(kernels.plan, (B,), (*tensors, n, count, r, steps), device, NP=NP, num_warps=4 if NP <= 2048 else 8)
    return *_merged(x, I, size, place, keep, group, prefix, "merge"), group


@merge_tokens.fake
def _(
    x: Tensor, I: Tensor, size: Tensor | None, place: Tensor | None, prefix: int, m: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, N, C = x.shape
    x, I, size = x.new_empty(B, prefix + m, C), I.new_empty(B, m), I.new_empty(B, prefix + m)
    place, group = (x.new_empty(B, each, dtype=torch.int64) for each in (m, N - prefix))
    return x, I, size, place, group


# ---- evit ----


@op(launches=2)
def choose_tokens(
    x: Tensor, I: Tensor, place: Tensor | None, prefix: int, m: int, fuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A stage of evit or, with `fuse`, of evit-fused, from n tokens to M = m or m + 1.

    Args:
        x: [B, P + n, C]; I: float32 [B, n]; place: int64 [B, n], None: 0 to n - 1; prefix: P; 1 <= m < n.

    Returns:
        x [B, P + M, C] and place [B, M] of the remaining tokens; group [B, n] (`sparsify.nn.tokens.ranking`).
    """
    from sparsify.ops.gpu import token_kernels as kernels

    x, I = x.contiguous(), I.contiguous()
    B, n = I.shape
    keep, group = (x.new_empty(B, each, dtype=torch.int64) for each in (m + fuse, n))
    NP = power_of_two(n)
    arguments = (I, keep, group, n, m)
    launch(kernels.choose, (B,), arguments, x.device, FUSE=int(fuse), NP=NP, num_warps=4 if NP <= 2048 else 8)
    x, _, _, place = _merged(x, I, None, place, keep, group, prefix, "evit-fused" if fuse else "evit")
    return x, place, group


@choose_tokens.fake
def _(x: Tensor, I: Tensor, place: Tensor | None, prefix: int, m: int, fuse: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, N, C = x.shape
    kept, group = (x.new_empty(B, each, dtype=torch.int64) for each in (m + fuse, N - prefix))
    return x.new_empty(B, prefix + m + fuse, C), kept, group


def _merged(
    x: Tensor, I: Tensor, size: Tensor | None, place: Tensor | None, keep: Tensor, group: Tensor, prefix: int, way: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, I, size and place of the tokens that `keep` and `group` name; way: merge, evit (no I, no size) or evit-fused."""
    from sparsify.ops.gpu import token_kernels as kernels

    B, _, C = x.shape
    n, m, merges = group.shape[1], keep.shape[1], way == "merge"
    new_x, new_place = x.new_empty(B, prefix + m, C), torch.empty_like(keep)
    new_I, new_size = (I.new_empty((B, each) if merges else 0) for each in (m, prefix + m))
    tensors = (x, I, _or(size, I), _or(place, keep), keep, group, new_x, new_I, new_size, new_place)
    CP = power_of_two(C)
    constants = dict(C=C, CP=CP, BLOCK=256, MEMBERS=max(1, 4096 // CP))
    constants |= dict(SIZED=size is not None, PLACED=place is not None, GROUPED=way != "evit", MERGES=merges)
    launch(
        kernels.merge, (prefix + m, B), (*tensors, n, m, prefix), x.device, **constants, num_warps=8 if CP > 1024 else 4
    )
    return new_x, new_I, new_size, new_place


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor or, where there is none and the kernel reads none, any other of its type."""
    return other if tensor is None else tensor.contiguous()


def _rows(x: Tensor) -> Tensor:
    """x with adjacent elements in its last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
