"""Sparse attention as one torch.library op: tensors in, tensors out. Imports nothing of the packages above.

`sparsify::sparse_attention` holds selection, attention over the kept keys and tail, so that a fast path never writes the
scores out. A predictor (`sparsify.nn.predictor`) says by a `Ranking` which keys each query wants:

    S_i   = the b keys with the highest row_i . col_j;  all keys for prefix rows
    out_i = attention over S_i, and a tail for the rest                            (`sparsify.ops.tails`)

It has the kernels of `cpu/` (`backends.py` says where), the differentiable reference of `reference.py` (backward recomputes
it), a fake kernel (shapes for torch.compile and torch.export) and a MACs formula (`macs.py`). Selection breaks ties by the
lower key index in every backend.

Models call `attention`: the op, or, without a tracer, the kernel itself (torch.library takes 10 to 20 us for a call), the
kernel with gradients of its own (`cpu.kernels.trained`), or `masked.py`. Under `torch.export` it is the reference inline: an
exported program holds PyTorch's own operators only and runs where this package is not installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsify.ops import backends, masked, reference, tails
from sparsify.ops.cpu import kernels
from sparsify.ops.gpu import attention as gpu
from sparsify.ops.selection import Context, Ranking
from sparsify.ops.spec import Spec

SDPA = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Paths of dense attention by one of torch's kernels for GPUs; each raises `RuntimeError` for what it does not take."""

TENSORS = 11  # leading arguments of the op that are tensors or None


@torch.library.custom_op("sparsify::sparse_attention", mutates_args=())
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    features: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    size: Tensor | None,
    place: Tensor | None,
    cell: Tensor | None,
    ranked: float,
    ranks: Sequence[int],
    macs: int,
    budgets: Sequence[int],
    prefix: int,
    tail: str,
    grid: Sequence[int],
    cells: Sequence[int],
    tile: Sequence[int],
    scale: float,
    backend: str = "reference",
    precision: str = "input",
) -> Tensor:
    """Attention of every query over the b keys that its row ranks highest, and a tail for the rest.

    Args:
        q, k, v: [B, H, N, d], any strides, one floating dtype.
        row, col, features, shift, ranked, ranks, macs: see `selection.Ranking`.
        mask, size, place, cell: see `selection.Context`; a row that may attend to nothing gives 0. log s_j is added to the
            logit of key j, and the tail counts and averages key j s_j times. Cells and tiles follow `place`.
        budgets, prefix, tail, grid, cells, tile, scale: see `Spec.flat`.
        backend: cpu: the kernels, where they are available and take these inputs (float32 or bfloat16 on cpu, no mask, a
            tail that they know); else the reference computes.
        precision: input or bf16; see `sparsify.nn.attention.Execution`. The reference computes in that of the inputs.

    Returns:
        [B, N, H*d], contiguous, dtype of q.
    """
    _refuse_forward_mode()
    ranking = Ranking(row, col, features, shift, ranked, tuple(ranks), macs)
    context = Context(mask, size, place, cell)
    spec = Spec.of_flat(budgets, prefix, tail, grid, cells, tile, scale)
    _check(q, ranking, spec)
    if _kernel(backend, q, context):
        return kernels.attention(q, k, v, ranking, context, spec, precision)
    return reference.attend(q, k, v, ranking, context, spec)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranking: Ranking,
    context: Context,
    spec: Spec,
    backend: str = "reference",
    precision: str = "input",
) -> Tensor:
    """`sparse_attention`, without torch.library where it can be: [B, H, N, d] x 3 -> [B, N, H*d].

    Args:
        backend: cpu, reference, or masked (`masked.py`).
    """
    path = _path(backend, q, k, v, ranking, context)
    if path in ("kernel", "trained", "masked"):
        _check(q, ranking, spec)
    if path == "kernel":
        return kernels.attention(q, k, v, ranking, context, spec, precision)
    if path == "trained":
        call = partial(kernels.attention, ranking=ranking, context=context, spec=spec, precision=precision)
        return kernels.trained(q, k, v, context, spec, call)
    if path == "masked":
        return masked.attend(q, k, v, ranking, context, spec)
    if path == "inline":
        return reference.attend(q, k, v, ranking, context, spec)
    return sparse_attention(q, k, v, *ranking[:4], *context, *ranking[4:], *spec.flat(), backend, precision)


def dense(
    path: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    precision: str,
    size: Tensor | None = None,
) -> Tensor:
    """Dense attention, [B, H, M, d] and [B, H, N, d] x 2 -> [B, M, H*d].

    Args:
        path: 'sdpa' as timm computes it, with sizes on a GPU by `gpu.attention`; 'dense-cpu' by our kernel (no mask,
            M = N); one of `SDPA`.
        size: tokens that each key stands for, [B, N]; log s is added to the logits.
    """
    if path == "dense-cpu":
        return kernels.dense(q, k, v, scale, precision, size)
    if path == "sdpa" and size is not None and mask is None and gpu.takes(q, k, v):
        return gpu.sized_attention(q, k, v, size, scale)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if size is not None:
        logarithm = size.log()[:, None, None].to(q.dtype)  # (B, 1, 1, N)
        if mask is None:
            mask = logarithm
        else:
            mask = torch.where(mask, logarithm, -torch.inf) if mask.dtype == torch.bool else mask + logarithm
    with sdpa_kernel(SDPA[path]) if path in SDPA else contextlib.nullcontext():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _path(backend: str, q: Tensor, k: Tensor, v: Tensor, ranking: Ranking, context: Context) -> str:
    """What computes a call.

    Returns:
        'kernel'; 'trained', the kernel with gradients; 'masked'; 'inline', the reference's operators for an export or a
        transformation; or 'op', torch.library's.
    """
    if torch.compiler.is_exporting() or backends.transformed():
        return "inline"
    if backend == "reference" or context.mask is not None or backends.needs_grad(context.size):
        return "op"
    if backend == "masked" and (backends.eager(q) or backends.compiling()):
        return "masked"
    if not backends.eager(q):
        return "op"
    if not _kernel(backend, q, context):
        return "op"
    if not torch.is_grad_enabled():
        return "kernel"
    if backends.needs_grad(q, k, v):
        return "trained"
    # only the predictor requires gradients: the op keeps the output in the graph, and its backward returns None for it
    return "op" if backends.needs_grad(*ranking[:4]) else "kernel"


def _kernel(backend: str, q: Tensor, context: Context) -> bool:
    if backend != "cpu" or context.cell is not None:
        return False
    return backends.resolve(backend, q, context.mask) == "cpu"


def _refuse_forward_mode() -> None:
    """torch.library would lose the derivative, and the result would be 0."""
    if backends.forward_mode():
        raise NotImplementedError(
            "sparsify::sparse_attention has no forward-mode derivative: call ops.attention.attention"
        )


def _check(q: Tensor, ranking: Ranking, spec: Spec) -> None:
    """Raise `ValueError` for constants that no implementation computes; the kernels would read beyond their tensors."""
    _, H, N, d = q.shape  # each look at a shape takes 0.2 us
    _checked(spec, ranking.ranks, H, N, d if ranking.row is None else ranking.row.shape[3])


@lru_cache(maxsize=4096)
def _checked(spec: Spec, ranks: tuple[int, ...], H: int, N: int, r: int) -> None:
    pairs = (spec.grid, *spec.cells, *((spec.tile,) if spec.tile else ()))
    for right, what in (
        (all(1 <= b <= N for b in spec.budgets), f"budgets {spec.budgets}: expected 1 to {N}"),
        (len(spec.budgets) in (1, H), f"budgets {spec.budgets}: expected 1 or {H}"),
        (len(spec.cells) in (1, H), f"cells {spec.cells}: expected 1 or {H} grids"),
        (spec.prefix >= 0, f"prefix {spec.prefix}: expected 0 or more"),
        (spec.tail in (*tails.TAILS, tails.ASSIGNED), f"tail '{spec.tail}': expected one of {', '.join(tails.TAILS)}"),
        (
            all(len(p) == 2 and min(p) >= 1 for p in pairs),
            f"grid, cells, tile {pairs}: expected 2 numbers of 1 or more",
        ),
        (len(ranks) == H and all(1 <= x <= r for x in ranks), f"ranks {ranks}: expected {H} of 1 to {r}"),
    ):
        if not right:
            raise ValueError(f"sparse_attention: {what}")


def _fake(q: Tensor, *_: Any) -> Tensor:
    _refuse_forward_mode()
    B, H, N, d = q.shape
    return q.new_empty(B, N, H * d)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.constants = inputs[TENSORS:]


def _backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
    """Gradients of the reference, recomputed; the choice of keys has none."""
    ranked, ranks, macs, *spec, _, _ = ctx.constants

    def call(*tensors: Any) -> Tensor:
        q, k, v, row, col, features, shift, *context = tensors
        ranking = Ranking(row, col, features, shift, ranked, tuple(ranks), macs)
        return reference.attend(q, k, v, ranking, Context(*context), Spec.of_flat(*spec))

    grads = reference.gradients(call, ctx.saved_tensors, ctx.needs_input_grad[:TENSORS], grad)
    return (*grads, *[None] * len(ctx.constants))


sparse_attention.register_fake(_fake)
sparse_attention.register_autograd(_backward, setup_context=_setup)
