"""MACs formulas of the ops: one multiply-accumulate counts once, per call, batch included.

Counted are the products that the method needs, whatever a backend executes: the reference writes out full rows and
masks them, a compiled kernel does not. Sums, softmax, exp, top-k and elementwise products count 0, as in fvcore.

    prefix      rows of the P prefix tokens, which attend to all N keys
    predictor   the scores that rank the keys, and the projections that they need
    kept        logits and values of the b kept keys of each of the n = N - P patch rows
    tail        logits and values of the cells, and the assignments of `clusters`

`HANDLES` has them in the form that fvcore's `set_op_handle` takes; torch's `FlopCounterMode` sees two flops for each once
this module is imported. `sparsify.measure.analytic` counts the same things without this file, so that the two can disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import sparsify.ops.gpu.tokens  # noqa: F401 (registers ops)
from sparsify.ops import tails
from sparsify.ops.attention import TENSORS
from sparsify.ops.spec import Spec, of_head

PARTS = ("kept", "prefix", "predictor", "tail")


def dense_macs(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """QK' and AV of dense attention: q [..., N, d], k [..., M, d], v [..., M, e] -> ... * N * M * (d + e)."""
    return prod(q[:-2]) * q[-2] * k[-2] * (q[-1] + v[-1])


def sparse_macs(
    shape: Sequence[int],
    predictor: int,
    shared: Sequence[int],
    features: Sequence[int],
    spec: Spec,
    placed: bool = False,
) -> Counter[str]:
    """MACs of one `sparse_attention` by part.

    Args:
        shape: [B, H, N, d] of q.
        predictor: of one image (`Ranking.macs`).
        shared: products of a score that its logit needs too, of each head: where the predictor is folded into q and k, the
            first r of d products are done.
        features: size of what `clusters` compares of a key, of each head.
        spec: the call's constants.
        placed: patch tokens have places of their own on the grid, so that its cells stay as they are.
    """
    B, H, N, d = shape
    P = min(spec.prefix, N)
    n = N - P
    macs = Counter(
        prefix=H * P * N * 2 * d,
        predictor=predictor,
        kept=n * sum(of_head(spec.budgets, h) * (2 * d - shared[h]) for h in range(H)),
        tail=_tail(shape, features, spec, placed),
    )
    return Counter({part: B * count for part, count in macs.items()})


def _tail(shape: Sequence[int], features: Sequence[int], spec: Spec, placed: bool) -> int:
    """Logits and values of M cells and P prefix keys for each patch row; `clusters`: distances to M centres too."""
    _, H, N, d = shape
    P = min(spec.prefix, N)
    n, grid = N - P, spec.grid if placed else tails.patch_grid(N - P, spec.grid)
    if spec.tail == tails.ASSIGNED:
        counts = [rows * columns for rows, columns in spec.cells]
    elif tails.TAILS[spec.tail].stands_for_dropped_keys:
        counts = [tails.TAILS[spec.tail].count(grid, cells) for cells in spec.cells]
    else:
        return 0
    steps, total = tails.LLOYD_STEPS if spec.tail == "clusters" else 0, 0
    for h in range(H):
        M = of_head(counts, h)
        total += n * (M + P) * 2 * d + steps * n * M * features[h]
    return total


def _dense_handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """scaled_dot_product_attention(q, k, v, ...). No credit for a mask or for causality."""
    return Counter(scaled_dot_product_attention=dense_macs(*(v.type().sizes() for v in inputs[:3])))


def _sparse_handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    shapes = [v.type().sizes() if v.isCompleteTensor() else None for v in inputs[:TENSORS]]
    return _of_call(shapes, [_constant(v) for v in inputs[TENSORS:]])


@register_flop_formula(torch.ops.sparsify.sparse_attention)
def _flops(*arguments: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * sum(_of_call(arguments[:TENSORS], arguments[TENSORS:]).values())


@register_flop_formula(torch.ops.sparsify.sized_attention)
def _sized_flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * dense_macs(q, k, v)


@register_flop_formula(torch.ops.sparsify.merge_tokens)
def _merging_flops(
    x: Any, I: Any, size: Any, place: Any, prefix: int, m: int, count: int, out_shape: Any = None, **_: Any
) -> int:
    """Cosines of each of `count` tokens with all that are more important."""
    (B, n), C = I, x[2]
    return 2 * B * C * (count * (n - 1) - count * (count - 1) // 2)


@register_flop_formula(torch.ops.sparsify.fitted_importance)
def _fitted_flops(x: Any, weights: Any, size: Any, prefix: int, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * (x[1] - prefix) * x[2]


@register_flop_formula(torch.ops.sparsify.attention_importance)
def _importance_flops(
    q: Any, k: Any, size: Any, scale: float, rows: int, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return 2 * prod(q) * max(rows, 1)


def _of_call(shapes: Sequence[Any], constants: Sequence[Any]) -> Counter[str]:
    """`sparse_macs` of the op's arguments: shapes of its tensors, None for one that is not given, and its constants."""
    q, _, _, row, _, features, _, _, _, place, _ = shapes
    _, ranks, predictor, *spec = constants[: 3 + len(Spec._fields)]  # without backend and precision
    compared = ranks if features is None else q[1] * [features[-1]]
    shared = ranks if row is None else q[1] * [0]
    return sparse_macs(q, predictor, shared, compared, Spec.of_flat(*spec), place is not None)


def _constant(value: Any) -> Any:
    """The Python value of a graph value. A trace keeps a token count as aten::size, not as a constant: keep=1."""
    node = value.node()
    kind = node.kind()
    if kind == "prim::Constant":
        return value.toIValue()
    inputs = list(node.inputs())
    if kind == "prim::ListConstruct":
        return [_constant(v) for v in inputs]
    if kind in ("aten::Int", "prim::NumToTensor"):
        return _constant(inputs[0])
    if kind == "aten::size":
        return inputs[0].type().sizes()[_constant(inputs[1])]
    raise ValueError(f"cannot read a constant of an attention op from {kind}: a bug in sparsify")


HANDLES = {
    "aten::scaled_dot_product_attention": _dense_handle,
    "sparsify::sparse_attention": _sparse_handle,
}
