"""Merging: which tokens become one, what the merged one is, and for how many it counts (`docs/tokens.md`).

The idea of ToMe (ICLR 2023): similar tokens become one, in rounds. Here those of little importance go first, into more
important ones, and count little in the mean.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from sparsify.nn.importance import product

ROUND = 0.7  # share of the tokens that one round leaves at least; measured in docs/tokens.md
CANDIDATES = 2  # for each token that leaves, how many look for a nearest one
TOGETHER = 256  # how many look at once: few cosines in vain, and they stay in a cache


def rounds(n: int, m: int) -> list[int]:
    """Tokens left after each round of a merging from n to m: at least one, each to about `ROUND` of those before or more.

    In a round, cosines are those of the tokens as they came in; after it, those of the merged ones.
    """
    steps = max(1, math.ceil(math.log(n / m) / -math.log(ROUND) - 1e-9))
    left = n
    found: list[int] = []
    while not found or left > m:
        left = max(m, min(left - 1, round(left * (m / n) ** (1 / steps))))
        found.append(left)
    return found


def candidates(n: int, m: int) -> int:
    """How many of n tokens look for their nearest in a round that leaves m: `CANDIDATES` for each that leaves."""
    return min(n - 1, CANDIDATES * (n - m))


def cosines(n: int, m: int) -> int:
    """Cosines computed in a merging from n tokens to m, all rounds together."""
    return sum(
        (stop - start) * (before - start - 1)
        for before, left in itertools.pairwise([n, *rounds(n, m)])
        for start, stop in _parts(candidates(before, left))
    )


def _parts(looking: int) -> list[tuple[int, int]]:
    """Of those that look, least important first: the first and the one behind the last of each `TOGETHER`."""
    return [(start, min(start + TOGETHER, looking)) for start in range(0, looking, TOGETHER)]


def matching(x: Tensor, I: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Which of n tokens go into which, so that m are left: one round of the merging.

    The least important tokens (`candidates`) each find their nearest among those more important than themselves, by the
    cosine of the residual stream, which the folding of the predictor does not touch. The r = n - m of them with the lowest
    (1 - cosine) I leave; where that nearest one leaves too, both go where it goes. Of equal importance the lower index
    counts as less.

    Args:
        x: [B, n, C]; I: importance [B, n]; m: 1 <= m <= n.

    Returns:
        keep: the tokens that go on, int64 [B, m], ascending; group: place in `keep` of the token that each of the n goes
        into, int64 [B, n].
    """
    B, n = x.shape[0], int(x.shape[1])  # a tracer's shapes are tensors
    index = torch.arange(n, device=x.device).expand(B, n)
    looking, r = candidates(n, m), n - m
    if r == 0:
        return index, index
    order = I.argsort(dim=1, stable=True)  # (B, n) rising importance
    cosine, nearest = _nearest(nn.functional.normalize(x.detach().float(), dim=-1), order, looking)
    cost = (1 - cosine) * I.gather(1, order[:, :looking])
    leave = cost.argsort(dim=1, stable=True)[:, :r]
    into = index.scatter(1, order.gather(1, leave), nearest.gather(1, leave))
    for _ in range((r - 1).bit_length()):  # r may leave in one chain; every step doubles how far one sees
        into = into.gather(1, into)
    keep = (into != index).long().argsort(dim=1, stable=True)[:, :m]
    group = torch.zeros_like(into).scatter(1, keep, count_up(keep)).gather(1, into)
    return keep, group


def _nearest(unit: Tensor, order: Tensor, looking: int) -> tuple[Tensor, Tensor]:
    """The highest cosine of the `looking` first tokens in `order` [B, n] with one behind it there, and which that is: the
    first of several. unit: rows of length 1, [B, n, C]. Both [B, looking]."""
    B, n, C = unit.shape
    first = n * torch.arange(B, device=unit.device).unsqueeze(
        1
    )  # rows of all images under each other: gather is slower
    unit = unit.flatten(0, 1).index_select(0, (order + first).flatten()).view(B, n, C)
    highest, places = [], []
    for start, stop in _parts(looking):
        cosine = product(unit[:, start:stop], unit[:, start + 1 :].mT)  # (B, stop - start, n - start - 1)
        at = torch.arange(stop - start, device=unit.device)
        cosine[..., : stop - start].masked_fill_(at < at.unsqueeze(1), -math.inf)  # oneself and those before
        value, place = cosine.max(-1)
        highest.append(value)
        places.append(place + start + 1)
    return torch.cat(highest, 1), order.gather(1, torch.cat(places, 1))


def weighted_mean(x: Tensor, I: Tensor, group: Tensor, m: int) -> Tensor:
    """Means of x [B, n, C] over each group, weighted with I: what the rows that gave I read of the group. [B, m, C].

    Computed in float32 at least; a token alone in its group stays what it is, to the bit.
    """
    B, n, C = x.shape
    index, weight = group.clamp_min(0), I * (group >= 0)
    weight = weight / I.new_zeros(B, m).scatter_add(1, index, weight).gather(1, index)  # (B, n)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_exporting():  # ONNX has no bags
        total = torch.zeros(B, m, C, dtype=dtype, device=x.device)
        weighted = x.to(dtype) * weight.unsqueeze(-1).to(dtype)
        return total.scatter_add(1, index.unsqueeze(-1).expand(-1, -1, C), weighted).to(x.dtype)
    bag = (index + m * torch.arange(B, device=x.device).unsqueeze(1)).flatten()  # (B * n) row of the result
    bag, order = bag.sort(stable=True)
    starts = torch.searchsorted(bag, torch.arange(B * m, device=x.device))
    total = nn.functional.embedding_bag(  # sums of weighted rows; scatter_add takes three times as long
        order, x.reshape(B * n, C).to(dtype), starts, mode="sum", per_sample_weights=weight.flatten().to(dtype)[order]
    )
    return total.view(B, m, C).to(x.dtype)


def effective_size(size: Tensor, I: Tensor, group: Tensor, m: int) -> Tensor:
    """How many tokens a merged one stands for, so that its key at their weighted mean is given their attention again.

        log s = log sum_j I_j - sum_j w_j log(I_j / s_j),     w_j = I_j / sum_j I_j

    The count for tokens of equal importance, towards the largest s_j where one has all of it. size, I, group: [B, n].
    """
    total = I.new_zeros(I.shape[0], m).scatter_add(1, group, I)
    mean = I.new_zeros(I.shape[0], m).scatter_add(1, group, I * (I / size).log()) / total
    return total * (-mean).exp()


def count_up(like: Tensor) -> Tensor:
    """0, 1, 2 ... in every row of a tensor [B, n]."""
    return torch.arange(like.shape[1], device=like.device).expand_as(like)
