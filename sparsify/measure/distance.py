"""How far the output of a sparse model is from that of its dense original."""

from __future__ import annotations

from torch import Tensor


def distance(dense: Tensor, sparse: Tensor, logits: bool) -> float:
    """KL(dense || sparse) of class probabilities, or the relative squared error of features."""
    if not logits:
        return float((dense - sparse).square().sum() / dense.square().sum())
    p = dense.float().log_softmax(-1)
    return float((p.exp() * (p - sparse.float().log_softmax(-1))).sum(-1).mean())
