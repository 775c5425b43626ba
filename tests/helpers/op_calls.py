"""Calls of the attention op by the tensors of both predictors, flat."""

from __future__ import annotations

import torch

from sparsify.config import TokenLowrank
from sparsify.nn.predictor import TokenLowrankPredictor
from sparsify.ops import attention
from sparsify.ops.selection import Context, Ranking
from sparsify.ops.spec import Spec


def head_ranking(q, k, a_q, a_k, size, ranks, scale):
    """The ranking of a head-lowrank predictor: a_q, a_k [H, d, r], or None where they are folded."""
    row, col = (None, None) if a_q is None else (q @ a_q, k @ a_k)
    return Ranking(row, col, None, None if size is None else size.log() / scale, 1 / scale, tuple(ranks))


def token_ranking(q, k, w_down, w_up, reduce, mask, coef_scale, topk=0, threshold=0.0):
    """The ranking of a token-lowrank predictor. reduce: w_q, b_q, w_k, b_k, or four None."""
    knobs = TokenLowrank(coef_topk=topk or None, coef_threshold=threshold or None).model_dump()
    predictor = TokenLowrankPredictor(q.shape[1], q.shape[-1], q.shape[2], 0, w_down.shape[-2], knobs)
    for name, tensor in zip(("w_q", "b_q", "w_k", "b_k"), reduce, strict=True):
        setattr(predictor, name, None if tensor is None else torch.nn.Parameter(tensor))
    predictor.coef_scale = coef_scale
    predictor.weights_of = lambda N, tokens: (w_down, w_up)
    return predictor.requires_grad_(False)(q, k, mask, None, Spec.uniform(1, 0, "none", (1, 1), (1, 1)))


def _spec(spec, scale):
    return spec._replace(scale=scale) if isinstance(spec, Spec) else Spec.uniform(*spec, scale=scale)


def op(q, k, v, ranking, context, spec, backend="reference", precision="input"):
    """The op itself, through torch.library."""
    return attention.sparse_attention(q, k, v, *ranking[:4], *context, *ranking[4:], *spec.flat(), backend, precision)


def head_lowrank(
    q, k, v, a_q, a_k, mask, size, place, ranks, scale, spec, backend="reference", precision="input", call=op
):
    """Attention by a head-lowrank predictor; spec: budget, prefix, tail, grid, cells, tile; call: `op` or `attention`."""
    ranking = head_ranking(q, k, a_q, a_k, size, ranks, scale)
    return call(q, k, v, ranking, Context(mask, size, place), _spec(spec, scale), backend, precision)


def token_lowrank(
    q, k, v, w_down, w_up, reduce, mask, size, place, scale, coef, spec, backend="reference", precision="input", call=op
):
    """Attention by a token-lowrank predictor; coef: scale, top-k and threshold of the coefficients."""
    ranking = token_ranking(q, k, w_down, w_up, reduce, mask, *coef)
    return call(q, k, v, ranking, Context(mask, size, place), _spec(spec, scale), backend, precision)
