"""The C++ kernels as Python functions: whether they can be used here, and calls that match the reference.

They came with the package or are built at first use (`build.py`); then a call is one torch op on torch's own threads.
Float32 tensors are computed in float32 and keep the keys of the reference. With `precision="bf16"` (and for bfloat16
tensors) queries, keys and values are stored as bfloat16, products accumulate in float32, and predictor scores are rounded
to bfloat16, so that keys whose scores differ by less may change places. Without bfloat16 instructions bfloat16 tensors are
computed in float32.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.ops import reference, tails
from sparsify.ops.cpu import build
from sparsify.ops.selection import Context, Ranking, grid_of
from sparsify.ops.spec import Spec

ISAS = ("none", "avx2", "avx512", "avx512bf16")
TAILS = {"none": 0, "mean": 1, "cells": 2, "clusters": 3}
MOST_TOKENS, LARGEST_HEAD = 1 << 15, 1024


def available() -> str | None:
    """None if the kernels can be used (they are built now if need be); else the reason, in one line."""
    return _load()[1]


def isa() -> str:
    """Instruction set in use: avx512bf16, avx512 or avx2; SPARSIFY_ISA names a smaller one than the processor's."""
    level, reason = _load()
    return reason if reason else ISAS[level]


def supports(q: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernels, if they are `available`, can compute a call with queries q [B, H, N, d]."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and mask is None
        and q.shape[2] <= MOST_TOKENS
        and q.shape[3] <= LARGEST_HEAD
        and q.numel() > 0
    )


@cache
def _load() -> tuple[int, str | None]:
    """Level of the instruction set (index into `ISAS`), and why there is none; that is also a warning, once."""
    level, reason = _find()
    if reason:
        line = f"sparse attention is computed by the slow PyTorch reference: {reason}"
        warnings.warn(line, RuntimeWarning, stacklevel=2)
    return level, reason


@torch.compiler.assume_constant_result
def _level() -> int:
    """The level, which torch.compile takes as a constant of the program."""
    return _load()[0]


def _find() -> tuple[int, str | None]:
    wanted = os.environ.get("SPARSIFY_ISA", "")
    if wanted and wanted not in ISAS[1:]:
        return 0, f"SPARSIFY_ISA={wanted}: expected one of {', '.join(ISAS[1:])}"
    for prebuilt in (build.PREBUILT, None):  # where the one that came with the package does not load, compile
        built = build.build(say=lambda line: print(line, file=sys.stderr), prebuilt=prebuilt)
        if built.path is None:
            return 0, built.reason
        try:
            with ThreadPoolExecutor(1) as thread:  # where no tracer or transformation of this call is active
                best = thread.submit(_loaded, built.path).result()
            break
        except (OSError, RuntimeError) as error:
            if built.path != build.PREBUILT:
                why = str(error).splitlines()[0]
                return 0, f"the CPU kernels do not load ({why}): try 'sparsify build-kernels --force'"
    if best == 0:
        return 0, "this processor has no AVX2, which the CPU kernels need"
    return (min(best, ISAS.index(wanted)) if wanted else best), None


def _loaded(library: Path) -> int:
    """Load the library; the best instruction set that it and the processor have."""
    torch.ops.load_library(str(library))
    _describe()
    return int(torch.ops.sparsify_cpu.best_isa())


def _bf16(q: Tensor, precision: str) -> bool:
    return q.dtype == torch.bfloat16 or precision == "bf16"


def _flat(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranking: Ranking,
    context: Context,
    spec: Spec,
    precision: str = "input",
    op: object = None,
) -> Any:
    """`sparsify::sparse_attention` on the CPU, without a mask: [B, H, N, d] x 3 -> [B, N, H*d].

    op: another op of the library with the same arguments; what it returns is returned.
    """
    B, H, N, _ = q.shape
    P = min(spec.prefix, N)
    row, col, features, shift = ranking[:4]
    if row is None or col is None:
        row, col = q, k
    elif col.shape[:2] != (B, H):
        col = col.contiguous().expand(B, H, -1, -1)
    features = None if features is None or spec.tail != "clusters" else _flat(features)
    grid = grid_of(spec, N - P, context.place)
    tail, stored = TAILS[spec.tail], _bf16(q, precision)
    budgets, _, _, _, cells, *_ = spec.flat()
    constants = (spec.scale, budgets, P, tail, grid, cells, spec.tile, stored, _load()[0])
    tensors = (_flat(q), _flat(k), _flat(v), _flat(row), _flat(col), features, context.size, shift, context.place)
    call: Any = op or torch.ops.sparsify_cpu.sparse_attention.default
    return call(*tensors, ranking.ranks, *constants)


class _Trained(torch.autograd.Function):
    """A call of the kernels whose gradients are computed from the keys and cells that it found."""

    @staticmethod
    def forward(q, k, v, size, spec, m, call):  # type: ignore[no-untyped-def]
        return call(q, k, v, op=torch.ops.sparsify_cpu.probe_attention.default)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, size, *ctx.constants, _ = inputs
        _, kept, cells = output
        ctx.mark_non_differentiable(kept, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, size, kept, cells)

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        q, k, v, size, kept, cells = ctx.saved_tensors
        spec, m = ctx.constants
        if grad is None:
            return (None,) * 7
        if torch.is_grad_enabled():  # create_graph: the gradients are to be differentiated in turn
            chosen = _chosen(kept, cells, spec, m)
            call = partial(reference.attend_chosen, kept=chosen[0], cells=chosen[1], size=size, scale=spec.scale)
            return *reference.gradients(call, (q, k, v), ctx.needs_input_grad[:3], grad), None, None, None, None
        grad = _flat(grad.unflatten(-1, (q.shape[1], -1)).transpose(1, 2))
        constants = (spec.scale, spec.budgets, spec.prefix, TAILS[spec.tail], m, _load()[0])
        found = torch.ops.sparsify_cpu.sparse_backward.default(
            grad, _flat(q), _flat(k), _flat(v), kept, cells, size, *constants
        )
        return *found, None, None, None, None


def _chosen(kept: Tensor, cells: Tensor, spec: Spec, m: list[int]) -> tuple[Tensor, tuple[Tensor | None, int]]:
    """The kernels' kept keys [B, H, N, b] and cells [B, H, N] as the reference has them; -1: none."""
    (B, H, N, _), P = kept.shape, min(spec.prefix, kept.shape[2])
    mask = torch.zeros(B, H, N, N + 1, dtype=torch.bool).scatter(-1, kept.long() % (N + 1), True)[..., :N]
    mask[:, :, :P] = True
    if not tails.TAILS[spec.tail].stands_for_dropped_keys:
        return mask, (None, 0)
    own = torch.arange(N)  # every prefix token is a cell of its own
    return mask, (torch.where(own < P, own, cells.long() + P), P + max(m))


def trained(q: Tensor, k: Tensor, v: Tensor, context: Context, spec: Spec, call: Callable[..., Any]) -> Tensor:
    """The output [B, N, H*d] of `call`, which is `attention` by q, k, v and op, with gradients for q, k and v.

    The choice of keys has no gradient. Kept between forward and backward: q, k, v and b + 1 integers a row.
    """
    grid = grid_of(spec, max(0, q.shape[2] - spec.prefix), context.place)
    m = [tails.TAILS[spec.tail].count(grid, cells) for cells in spec.cells]
    return _Trained.apply(q, k, v, context.size, spec, m, call)[0]  # type: ignore[no-untyped-call]


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str = "input", size: Tensor | None = None
) -> Tensor:
    """Dense attention with the same inner loops as the sparse kernels: [B, H, N, d] x 3 -> [B, N, H*d]."""
    return torch.ops.sparsify_cpu.dense_attention.default(
        _flat(q), _flat(k), _flat(v), size, scale, _bf16(q, precision), _level()
    )


@cache
def _describe() -> None:
    """Tells torch.compile the shape of what the loaded library computes; once, whoever loads it again."""
    torch.library.register_fake("sparsify_cpu::dense_attention", _dense_shape)


def _dense_shape(q: Tensor, k: Tensor, *_: object) -> Tensor:
    B, H, N, d = q.shape
    return q.new_empty(B, N, H * d)
