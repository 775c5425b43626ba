"""The head-lowrank predictor in closed form: its basis from second moments of queries and keys.

Keys are ranked by r coordinates of q.k inside the head. With C_q = E[q q'] and C_k = E[(k - kbar)(k - kbar)'] (kbar: the
image's mean key, a constant per query that does not change the ranking) and

    U S V' = svd( C_q^{1/2} C_k^{1/2} ),    T_q = C_q^{-1/2} U,    T_k = C_k^{-1/2} V S,    T_q T_k' = I

the first r columns give the best rank-r scores when q and k are independent. All of S is put on the key side: then
E[(T_q' q)(T_q' q)'] = I, and squared distances between keys in the new coordinates are expected squared differences of
logits, which is what the clusters of the tail need.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONDITION = (
    1e-4  # eigenvalues are raised to this fraction of the largest: cond(C^{1/2}) <= 100, exact inverse to rounding
)


class Moments:
    """Running second moments of one block's queries and keys, float64, [H, d, d] each."""

    def __init__(self, heads: int, head_dim: int) -> None:
        self.c_q = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64)
        self.c_k = torch.zeros_like(self.c_q)
        self.images = 0

    def add(self, q: Tensor, k: Tensor, prefix: int) -> None:
        """Adds a batch: q, k [B, H, N, d]; prefix rows of q, which attend densely, are left out."""
        patch = q[:, :, prefix:].double() if q.shape[2] > prefix else q.double()
        centred = (k - k.mean(2, keepdim=True)).double()
        self.c_q += torch.einsum("bhnd,bhne->hde", patch, patch).cpu() / patch.shape[2]
        self.c_k += torch.einsum("bhnd,bhne->hde", centred, centred).cpu() / k.shape[2]
        self.images += q.shape[0]

    def basis(self, over_heads: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """T_q, T_k [H, d, d] with T_q T_k' = I, and the singular values S [H, d]; float64. `over_heads`: all as one head."""
        c_q, c_k = (c.mean(0, keepdim=True) if over_heads else c for c in (self.c_q, self.c_k))
        root_q, inverse_q = _roots(c_q / max(1, self.images))
        root_k, _ = _roots(c_k / max(1, self.images))
        u, s, _ = torch.linalg.svd(root_q @ root_k)
        # columns with their largest entry positive, so that the same moments always give the same tensors
        largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
        t_q = inverse_q @ (u * torch.where(largest < 0, -1.0, 1.0))
        return t_q, torch.linalg.inv(t_q).mT, s  # the exact inverse transpose, not C_k^{-1/2} V S, for T_q T_k' = I


def _roots(c: Tensor) -> tuple[Tensor, Tensor]:
    """C^{1/2} and C^{-1/2} of symmetric matrices [H, d, d], small eigenvalues raised."""
    w, u = torch.linalg.eigh((c + c.mT) / 2)
    w = w.clamp_min(CONDITION * w.amax(-1, keepdim=True)).clamp_min(torch.finfo(c.dtype).tiny)
    return (u * w.sqrt().unsqueeze(-2)) @ u.mT, (u * w.rsqrt().unsqueeze(-2)) @ u.mT
