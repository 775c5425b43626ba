"""The head-lowrank predictor as parameters that can learn, and folded into `qkv` again.

Folded, the first r coordinates of q and k are the scores'. Unfolded, A_q and A_k pick them: they start as the first r
columns of the identity. Any A_q, A_k with A_k' A_q = I_r can be folded again exactly: with the columns of B a basis of what
A_k is orthogonal to, T_q = [A_q, B] has an inverse whose first r rows are A_k', so that T_k = T_q^{-T} begins with A_k and
T_q T_k' = I. `retract` keeps that condition while A_q and A_k learn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.nn import attention, graft, projection
from sparsify.nn.attention import SparseAttention
from sparsify.nn.predictor import HeadLowrankPredictor

TOLERANCE = 1e-4  # largest entry of A_k' A_q - I that counts as rounding


def unfold(model: nn.Module) -> None:
    """Gives folded head-lowrank predictors parameters a_q, a_k of their own, in place; the model computes the same."""
    for module in attention.sparse_modules(model).values():
        predictor = module.predictor
        if isinstance(predictor, HeadLowrankPredictor) and predictor.folded:
            module.predictor = HeadLowrankPredictor(module.head_dim, predictor.ranks, False).to(
                projection.weight(module)
            )


@torch.no_grad()
def retract(model: nn.Module) -> None:
    """A_k <- A_k (A_q' A_k)^{-1}, head by head, in place, where the predictor is to be folded again: A_k' A_q = I_r."""
    for predictor in _unfolded(model):
        assert predictor.a_q is not None and predictor.a_k is not None
        for h, r in enumerate(predictor.ranks):
            a_q, a_k = predictor.a_q[h, :, :r].double(), predictor.a_k[h, :, :r].double()  # (d, r) each
            predictor.a_k[h, :, :r] = torch.linalg.solve((a_q.mT @ a_k).mT, a_k.mT).mT.to(predictor.a_k.dtype)
            predictor.a_q[h, :, r:] = 0
            predictor.a_k[h, :, r:] = 0


@torch.no_grad()
def fold(model: nn.Module) -> bool:
    """Folds the unfolded predictors of `model` into `qkv`, in place, where that is exact.

    Returns:
        Whether all are folded now: False, with nothing changed, where something stands between projection and product, or
        A_k' A_q is not I.
    """
    modules = [m for m in attention.sparse_modules(model).values() if isinstance(m.predictor, HeadLowrankPredictor)]
    modules = [m for m in modules if not m.predictor.folded]  # type: ignore[union-attr]
    if not all(_foldable(m) for m in modules):
        return False
    for module in modules:
        predictor = module.predictor
        assert isinstance(predictor, HeadLowrankPredictor) and predictor.a_q is not None and predictor.a_k is not None
        bases = [_basis(predictor.a_q[h, :, :r], predictor.a_k[h, :, :r]) for h, r in enumerate(predictor.ranks)]
        t_q = torch.stack(bases)  # (H, d, d)
        projection.fold(module, t_q, torch.linalg.inv(t_q).mT)
        module.predictor = HeadLowrankPredictor(module.head_dim, predictor.ranks, True)
    return True


def _unfolded(model: nn.Module) -> list[HeadLowrankPredictor]:
    modules = attention.sparse_modules(model).values()
    found = [m.predictor for m in modules if graft.foldable(m)]
    return [p for p in found if isinstance(p, HeadLowrankPredictor) and not p.folded]


def _foldable(module: SparseAttention) -> bool:
    predictor = module.predictor
    assert isinstance(predictor, HeadLowrankPredictor) and predictor.a_q is not None and predictor.a_k is not None
    if not graft.foldable(module):
        return False
    for h, r in enumerate(predictor.ranks):
        product = predictor.a_k[h, :, :r].double().mT @ predictor.a_q[h, :, :r].double()
        if not bool((product - torch.eye(r, dtype=product.dtype, device=product.device)).abs().max() <= TOLERANCE):
            return False
    return True


def _basis(a_q: Tensor, a_k: Tensor) -> Tensor:
    """T_q [d, d]: A_q, then an orthonormal basis of what A_k [d, r] is orthogonal to; float64."""
    a_q, a_k = a_q.double(), a_k.double()
    u = torch.linalg.svd(a_k, full_matrices=True).U  # (d, d)
    return torch.cat([a_q, u[:, a_k.shape[1] :]], 1)
