"""The head-lowrank predictor as trainable parameters, and folded into `qkv` again.

Folded, the first r coordinates of q and k give the scores. Not folded, A_q and A_k select them: initially the first r
columns of the identity. Any A_q, A_k with A_k' A_q = I_r can be folded exactly: let the columns of B be a basis of the
orthogonal complement of A_k. T_q = [A_q, B] has an inverse whose first r rows are A_k', so that T_k = T_q^{-T} begins with
A_k and T_q T_k' = I. `retract` restores that condition while A_q and A_k are trained.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparsify.nn import attention, projection
from sparsify.nn.attention import SparseAttention
from sparsify.nn.predictor import HeadLowrankPredictor

TOLERANCE = 1e-4  # largest entry of A_k' A_q - I that counts as rounding


def unfold(model: nn.Module) -> None:
    """Replace folded head-lowrank predictors by ones with parameters a_q, a_k, in place; the outputs stay the same."""
    for module, predictor in _head_lowrank(model, folded=True):
        unfolded = HeadLowrankPredictor(module.head_dim, predictor.ranks, False)
        module.predictor = unfolded.to(projection.weight(module))


@torch.no_grad()
def retract(model: nn.Module) -> None:
    """A_k <- A_k (A_q' A_k)^{-1} for each head, so that A_k' A_q = I_r; in place, where the predictor can be folded."""
    for module, predictor in _head_lowrank(model, folded=False):
        if not projection.foldable(module, module.rotary):
            continue
        assert predictor.a_q is not None and predictor.a_k is not None
        for h, (a_q, a_k) in enumerate(predictor.by_head()):
            r, q, k = predictor.ranks[h], a_q.double(), a_k.double()  # (d, r) each
            a_k.copy_(torch.linalg.solve((q.mT @ k).mT, k.mT).mT)
            predictor.a_q[h, :, r:] = 0
            predictor.a_k[h, :, r:] = 0


@torch.no_grad()
def fold(model: nn.Module) -> bool:
    """Fold the predictors of `model` into `qkv`, in place, if that is exact for all of them.

    Returns:
        Whether all are folded now. False, with nothing changed: a norm, rotation or shared keys prevent it
        (`projection.foldable`), or A_k' A_q is not I.
    """
    found = list(_head_lowrank(model, folded=False))
    if not all(projection.foldable(module, module.rotary) and _inverse(predictor) for module, predictor in found):
        return False
    for module, predictor in found:
        t_q = torch.stack([_basis(a_q.double(), a_k.double()) for a_q, a_k in predictor.by_head()])  # (H, d, d)
        projection.fold(module, t_q, torch.linalg.inv(t_q).mT, predictor.ranks)
        module.predictor = HeadLowrankPredictor(module.head_dim, predictor.ranks, True)
    return True


def _head_lowrank(model: nn.Module, folded: bool) -> Iterator[tuple[SparseAttention, HeadLowrankPredictor]]:
    for module in attention.sparse_modules(model).values():
        if isinstance(module.predictor, HeadLowrankPredictor) and module.predictor.folded == folded:
            yield module, module.predictor


def _inverse(predictor: HeadLowrankPredictor) -> bool:
    """Whether A_k' A_q = I_r for every head, up to rounding."""
    for a_q, a_k in predictor.by_head():
        product = a_k.double().mT @ a_q.double()
        eye = torch.eye(len(product), dtype=product.dtype, device=product.device)
        if not bool((product - eye).abs().max() <= TOLERANCE):
            return False
    return True


def _basis(a_q: Tensor, a_k: Tensor) -> Tensor:
    """T_q [d, d]: A_q, then an orthonormal basis of the orthogonal complement of A_k [d, r]; float64."""
    u = torch.linalg.svd(a_k, full_matrices=True).U  # (d, d)
    return torch.cat([a_q, u[:, a_k.shape[1] :]], 1)
