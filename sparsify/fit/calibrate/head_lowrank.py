"""The head-lowrank predictor in closed form: its basis from second moments of queries and keys, and one rank for each head.

Keys are ranked by r coordinates of q.k inside the head. With C_q = E[q q'] and C_k = E[(k - kbar)(k - kbar)'] (kbar: the
image's mean key, a constant per query that does not change the ranking) and

    U S V' = svd( C_q^{1/2} C_k^{1/2} ),    T_q = C_q^{-1/2} U,    T_k = C_k^{-1/2} V S,    T_q T_k' = I

the first r columns give the best rank-r scores when q and k are independent. All of S is put on the key side: then
E[(T_q' q)(T_q' q)'] = I, and squared distances between keys in the new coordinates are expected squared differences of
logits, which is what the clusters of the tail need.

A fixed sum of ranks is spent over the heads where the calibration images need them. Error of a head at rank r: squared
difference between its sparse and its dense output after `proj`, measured on dense activations at all ranks. Weight of its
block: the KL divergence of the model's output when that block alone is sparse, divided by the block's error at the same
rank. Weighted errors add up over heads to within the noise of the measurement (docs/design.md), so their sum is minimised
for a given sum of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

CONDITION = (
    1e-4  # eigenvalues are raised to this fraction of the largest: cond(C^{1/2}) <= 100, exact inverse to rounding
)
STEP = 4  # ranks move four at a time: a multiple of what each vector width takes of a row of scores


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


def candidates(rank: int, head_dim: int) -> list[int]:
    """Ranks that a head may have around a mean of `rank`: multiples of 4 from rank/2 to 4 rank, at most d; and `rank`."""
    low, high = max(STEP, rank // 2 // STEP * STEP), min(head_dim, 4 * rank)
    ranks = {r for r in (low, 12, 16, 20, 24, 32, 48, 64, 96, 128) if low <= r <= high}
    return sorted(ranks | {min(head_dim, rank)})


def spend(
    error: Tensor, distances: Sequence[float], ranks: list[int], mean_rank: int, sparse: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """One rank for each head of each block, their mean over the heads of the `sparse` blocks at most `mean_rank`.

    error: [depth, H, len(ranks)], of each head at each of the `candidates`; distances: KL divergence of the model's output
    when that block alone is sparse. Heads of blocks that are not sparse have `mean_rank`.
    """
    depth, heads, _ = error.shape
    at_mean = error[:, :, ranks.index(mean_rank)].sum(1)
    weights = [d / max(float(e), 1e-12) for d, e in zip(distances, at_mean, strict=True)]
    error = error * torch.tensor(weights, dtype=torch.float64)[:, None, None]
    chosen = iter(allocate(error[sparse].flatten(0, 1), ranks, mean_rank))
    return tuple(tuple(islice(chosen, heads)) if i in sparse else (mean_rank,) * heads for i in range(depth))


def allocate(error: Tensor, ranks: list[int], mean_rank: int) -> tuple[int, ...]:
    """One rank for each item: they minimise the sum of errors with sum of ranks <= items * mean_rank (dynamic programming).

    error: [items, len(ranks)], weighted error of each head at each candidate, >= 0; ranks: the candidates, ascending.
    """
    error = error.flip(1).cummax(1).values.flip(1)  # more rank never counts as worse: measurement noise
    total = len(error) * mean_rank
    best = torch.zeros(total + 1, dtype=torch.float64)  # least error of the items so far with at most that sum
    choices = []
    for item in error:
        options = torch.full((len(ranks), total + 1), torch.inf, dtype=torch.float64)
        for j, r in enumerate(ranks):
            if r <= total:
                options[j, r:] = best[: total + 1 - r] + item[j]
        best, choice = options.min(0)
        choices.append(choice)
    if not torch.isfinite(best[total]):
        return (mean_rank,) * len(error)
    chosen = []
    for choice in reversed(choices):
        chosen.append(ranks[int(choice[total])])
        total -= chosen[-1]
    return tuple(reversed(chosen))


def _roots(c: Tensor) -> tuple[Tensor, Tensor]:
    """C^{1/2} and C^{-1/2} of symmetric matrices [H, d, d], small eigenvalues raised."""
    w, u = torch.linalg.eigh((c + c.mT) / 2)
    w = w.clamp_min(CONDITION * w.amax(-1, keepdim=True)).clamp_min(torch.finfo(c.dtype).tiny)
    return (u * w.sqrt().unsqueeze(-2)) @ u.mT, (u * w.rsqrt().unsqueeze(-2)) @ u.mT
