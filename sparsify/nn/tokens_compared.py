"""Choosing and merging of tokens (`tokens.ranking`, `merging.matching`) by comparisons of all n x n pairs, without a sort.

For programs of runtimes that sort on one thread and change the layout of the tokens for it. Up to some hundred tokens
comparisons are cheaper there. Results are the same; of ties too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.nn.merging import candidates

NOWHERE = -2.0  # below any cosine


def matching(x: Tensor, I: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """`merging.matching` of x [B, n, C] and I [B, n]."""
    B, n = x.shape[0], int(x.shape[1])
    index = torch.arange(n, dtype=torch.int32, device=x.device)
    if n == m:
        return index.long().expand(B, n), index.long().expand(B, n)
    rank = ranks(I, index)  # (B, n) rising importance
    unit = nn.functional.normalize(x.detach().float(), dim=-1)
    later = rank.unsqueeze(1) > rank.unsqueeze(2)  # (B, n, n) [i, j]: j is more important than i
    cosine = torch.where(later, unit @ unit.mT, NOWHERE)
    highest = cosine.amax(-1)  # (B, n)
    nearest = torch.where(cosine == highest.unsqueeze(-1), rank.unsqueeze(1), n).amin(-1)  # (B, n) its rank: ties
    cost = torch.where(rank < candidates(n, m), (1 - highest) * I, torch.inf)
    gone = ranks(cost, rank) < n - m  # (B, n)
    into = torch.where(gone, at_rank(nearest, rank, index), index)
    for _ in range((n - m - 1).bit_length()):  # see `merging.matching`
        into = into.gather(1, into.long())
    keep, position = places(~gone, index, m)
    return keep.long(), position.gather(1, into.long()).long()


def ranking(I: Tensor, m: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """`tokens.ranking`."""
    index = torch.arange(int(I.shape[1]), dtype=torch.int32, device=I.device)
    rank = ranks(-I, index)  # (B, n) falling importance
    stay = rank < m + fuse
    keep, position = places(stay, index, m + fuse)
    if not fuse:
        return keep.long(), torch.where(stay, position, -1).long()
    fused = at_rank(index[m : m + 1].expand(I.shape[0], 1), rank, position)  # (B, 1) place of the first of the others
    return keep.long(), torch.where(rank < m, position, fused).long()


def places(stay: Tensor, index: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Of n tokens the m that `stay` [B, n]: their index, int32 [B, m], ascending; and how many of them lie before each one,
    int32 [B, n]."""
    position = (stay.unsqueeze(1) & (index < index.unsqueeze(1))).sum(-1, dtype=torch.int32)
    return at_rank(index[:m].expand(stay.shape[0], m), torch.where(stay, position, -1), index), position


def ranks(values: Tensor, ties: Tensor) -> Tensor:
    """The place of each of n values in rising order, int32 [B, n]; equal ones by `ties`, [n] or [B, n]."""
    mine, other = values.unsqueeze(-1), values.unsqueeze(-2)
    first = (other == mine) & (ties.unsqueeze(-2) < ties.unsqueeze(-1))
    return ((other < mine) | first).sum(-1, dtype=torch.int32)


def at_rank(wanted: Tensor, rank: Tensor, values: Tensor) -> Tensor:
    """The value of the one that has each `wanted` rank: [B, k] of rank [B, n] and values, int32 [n] or [B, n]."""
    found = wanted.unsqueeze(-1) == rank.unsqueeze(-2)  # (B, k, n)
    return torch.where(found, values.unsqueeze(-2), 0).sum(-1, dtype=torch.int32)
