"""MACs formulas of the ops: one multiply-accumulate counts once, per call, batch included.

Counted are the products that the method needs, whatever a backend executes: the reference writes out full rows and
masks them, a compiled kernel does not. Sums, softmax, exp, top-k and elementwise products count 0, as in fvcore.

    prefix      rows of the P prefix tokens, which attend to all N keys
    predictor   the scores that rank the keys, and the projections that they need
    kept        logits and values of the b kept keys of each of the n = N - P patch rows
    tail        logits and values of the cells, and the assignments of `clusters`

`HANDLES` has them in the form that fvcore's `set_op_handle` takes. `sparsify.measure.analytic` counts the same things
without this file, so that the two can disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

from sparsify.ops import tails

PARTS = ("kept", "prefix", "predictor", "tail")


def dense_macs(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """QK' and AV of dense attention: q [..., N, d], k [..., M, d], v [..., M, e] -> ... * N * M * (d + e)."""
    return prod(q[:-2]) * q[-2] * k[-2] * (q[-1] + v[-1])


def head_lowrank_macs(
    shape: Sequence[int], ranks: Sequence[int], folded: bool, budget: int, prefix: int, tail: str, grid: Sequence[int],
    cells: Sequence[int], placed: bool = False,
) -> Counter[str]:  # fmt: skip
    """MACs of one `head_lowrank_attention` by part.

    Folded, the score is the first r products of q.k, so a kept logit needs only the other d - r.

    Args:
        shape: [B, H, N, d] of q.
        ranks: r of each head.
        folded: the projections are part of `qkv`; else they are computed here.
        budget, prefix, tail, grid, cells: see `Spec`.
        placed: patch tokens have places of their own on the grid, so that its cells stay as they are.
    """
    B, H, N, d = shape
    P = min(prefix, N)
    n, R = N - P, sum(ranks)
    macs = Counter(
        prefix=H * P * N * 2 * d,
        predictor=n * N * R + (0 if folded else 2 * N * d * R),
        kept=n * budget * (H * 2 * d - (R if folded else 0)),
        tail=_tail(H, n, P, d, R, tail, grid, cells, placed),
    )
    return Counter({part: B * count for part, count in macs.items()})


def token_lowrank_macs(
    shape: Sequence[int], rank: int, channels: int | None, coef_topk: int, budget: int, prefix: int, tail: str,
    grid: Sequence[int], cells: Sequence[int], placed: bool = False,
) -> Counter[str]:  # fmt: skip
    """MACs of one `token_lowrank_attention` by part.

    No credit is taken for zeros of W_up, nor for coefficients below a threshold (their number varies by image); a fixed
    top-k of the coefficients is credited.

    Args:
        shape: [B, H, N, d] of q.
        rank: r, rows of W_down.
        channels: c of the channel reduction; None for none (c = d).
        coef_topk: coefficients kept in each row; 0 keeps all.
        budget, prefix, tail, grid, cells: see `Spec`.
        placed: as for `head_lowrank_macs`.
    """
    B, H, N, d = shape
    P = min(prefix, N)
    n = N - P
    c = d if channels is None else channels
    kappa = coef_topk if 0 < coef_topk < rank else rank
    reduction = 0 if channels is None else 2 * H * N * d * c  # q W_q' and k W_k'
    down = H * N * c * rank  # W_down k'
    coefficients = H * n * c * rank  # q' K_down'
    up = H * n * N * kappa  # A~_down W_up
    macs = Counter(
        prefix=H * P * N * 2 * d,
        predictor=reduction + down + coefficients + up,
        kept=H * n * budget * 2 * d,
        tail=_tail(H, n, P, d, H * d, tail, grid, cells, placed),
    )
    return Counter({part: B * count for part, count in macs.items()})


def _tail(
    H: int, n: int, P: int, d: int, features: int, tail: str, grid: Sequence[int], cells: Sequence[int], placed: bool
) -> int:  # fmt: skip
    """Logits and values of M cells and P prefix keys for each patch row; `clusters`: distances to M centres too.

    features: size of the keys that `clusters` compares, summed over the heads.
    """
    if tail == "none":
        return 0
    own = (grid[0], grid[1])
    M = tails.cell_count(tail, P, own if placed else tails.patch_grid(n, own), (cells[0], cells[1]))
    assignments = tails.LLOYD_STEPS * n * M * features if tail == "clusters" else 0
    return H * n * (M + P) * 2 * d + assignments


def _dense_handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """scaled_dot_product_attention(q, k, v, ...). No credit for a mask or for causality."""
    return Counter(scaled_dot_product_attention=dense_macs(*(v.type().sizes() for v in inputs[:3])))


def _head_handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    a_q = inputs[3]
    ranks, _, budget, prefix, tail, grid, cells, _ = (_constant(v) for v in inputs[8:16])
    return head_lowrank_macs(
        inputs[0].type().sizes(), ranks, not a_q.isCompleteTensor(), budget, prefix, tail, grid, cells,
        inputs[7].isCompleteTensor(),
    )  # fmt: skip


def _token_handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    w_down, w_q = inputs[3], inputs[5]
    channels = w_q.type().sizes()[0] if w_q.isCompleteTensor() else None
    coef_topk, _, budget, prefix, tail, grid, cells, _ = (_constant(v) for v in inputs[14:22])
    rank = w_down.type().sizes()[-2]
    placed = inputs[11].isCompleteTensor()
    return token_lowrank_macs(
        inputs[0].type().sizes(), rank, channels, coef_topk, budget, prefix, tail, grid, cells, placed
    )


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
    "sparsify::head_lowrank_attention": _head_handle,
    "sparsify::token_lowrank_attention": _token_handle,
}
