"""Merging of tokens: which ones, the merged token's features, and its size (`docs/tokens.md`).

As in ToMe (ICLR 2023), similar tokens are merged in rounds. Here unimportant tokens are merged first, into more important
ones, and have a small weight in the mean.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from sparsify.nn.importance import plain_matmul

ROUND = 0.7  # minimum fraction of tokens that one round keeps; measured in docs/tokens.md
CANDIDATES = 2  # candidates for each token that a round removes
TOGETHER = 256  # candidates compared at once: the block stays in cache and little of the lower triangle is wasted


def rounds(n: int, m: int) -> list[int]:
    """Tokens remaining after each round of a merging from n to m: one round or more, each keeping about `ROUND` or more.

    A round computes cosines between its input tokens; the next one those of the merged tokens.
    """
    steps = max(1, math.ceil(math.log(n / m) / -math.log(ROUND) - 1e-9))
    counts = [n]
    while len(counts) == 1 or counts[-1] > m:
        counts.append(max(m, min(counts[-1] - 1, round(counts[-1] * (m / n) ** (1 / steps)))))
    return counts[1:]


def candidates(n: int, m: int) -> int:
    """How many of n tokens search their nearest token in a round that keeps m: `CANDIDATES` for each one removed."""
    return min(n - 1, CANDIDATES * (n - m))


def cosines(n: int, m: int) -> int:
    """Number of cosines computed in all rounds of a merging from n tokens to m."""
    return sum(
        (stop - start) * (before - start - 1)
        for before, after in itertools.pairwise([n, *rounds(n, m)])
        for start, stop in _chunks(candidates(before, after))
    )


def _chunks(count: int) -> list[tuple[int, int]]:
    """(start, stop) of each group of up to `TOGETHER` candidates."""
    return [(start, min(start + TOGETHER, count)) for start in range(0, count, TOGETHER)]


def matching(x: Tensor, I: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """One round of the merging: which m of n tokens remain, and which of them each token is merged into.

    The least important tokens (`candidates`) each find their nearest among all tokens more important than themselves, by
    the cosine of the residual stream (which does not depend on folding of the predictor). The r = n - m candidates with
    the lowest (1 - cosine) I are merged into their nearest; if that is merged too, both go where it goes. Of equally
    important tokens the one with the lower index counts as less important.

    Args:
        x: [B, n, C]; I: importance [B, n]; m: 1 <= m <= n.

    Returns:
        keep: index of the remaining tokens, int64 [B, m], ascending; group: for each of the n tokens, the index in `keep`
        of the token that it becomes part of, int64 [B, n].
    """
    B, n = x.shape[0], int(x.shape[1])  # a tracer's shapes are tensors
    index = torch.arange(n, device=x.device).expand(B, n)
    count, r = candidates(n, m), n - m
    if r == 0:
        return index, index
    order = I.argsort(dim=1, stable=True)  # (B, n) rising importance
    cosine, nearest = _nearest(nn.functional.normalize(x.detach().float(), dim=-1), order, count)
    cost = (1 - cosine) * I.gather(1, order[:, :count])
    merged = cost.argsort(dim=1, stable=True)[:, :r]
    into = index.scatter(1, order.gather(1, merged), nearest.gather(1, merged))
    for _ in range((r - 1).bit_length()):  # follows chains of up to r tokens: every step doubles the distance
        into = into.gather(1, into)
    keep = (into != index).long().argsort(dim=1, stable=True)[:, :m]
    group = torch.zeros_like(into).scatter(1, keep, count_up(keep)).gather(1, into)
    return keep, group


def _nearest(unit: Tensor, order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each of the first `count` tokens in `order` [B, n], its highest cosine with a later one there, and the index of
    that token (ties: the first in `order`). unit: rows of length 1, [B, n, C]. Both results [B, count]."""
    B, n, C = unit.shape
    first = n * torch.arange(B, device=unit.device).unsqueeze(1)  # index_select over all images: gather is slower
    unit = unit.flatten(0, 1).index_select(0, (order + first).flatten()).view(B, n, C)
    highest, positions = [], []
    for start, stop in _chunks(count):
        cosine = plain_matmul(unit[:, start:stop], unit[:, start + 1 :].mT)  # (B, stop - start, n - start - 1)
        at = torch.arange(stop - start, device=unit.device)
        cosine[..., : stop - start].masked_fill_(at < at.unsqueeze(1), -math.inf)  # itself and earlier ones
        value, position = cosine.max(-1)
        highest.append(value)
        positions.append(position + start + 1)
    return torch.cat(highest, 1), order.gather(1, torch.cat(positions, 1))


def weighted_mean(x: Tensor, I: Tensor, group: Tensor, m: int) -> Tensor:
    """Means of x [B, n, C] over each group, weighted with I [B, n]: [B, m, C].

    group: see `matching`; -1: in no group. Computed in float32 or higher; a token alone in its group does not change.
    """
    B, n, C = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    index, weight = group.clamp_min(0), I * (group >= 0)
    weight = weight / group_sums(weight, index, m).gather(1, index)  # (B, n)
    if torch.compiler.is_exporting():  # ONNX has no embedding_bag
        return (_members(index, m, dtype) @ (x.to(dtype) * weight.unsqueeze(-1).to(dtype))).to(x.dtype)
    bag = (index + m * torch.arange(B, device=x.device).unsqueeze(1)).flatten()  # (B * n) row of the result
    bag, order = bag.sort(stable=True)
    starts = torch.searchsorted(bag, torch.arange(B * m, device=x.device))
    # sums of weighted rows; scatter_add takes three times as long
    total = nn.functional.embedding_bag(
        order, x.reshape(B * n, C).to(dtype), starts, mode="sum", per_sample_weights=weight.flatten().to(dtype)[order]
    )
    return total.view(B, m, C).to(x.dtype)


def effective_size(size: Tensor, I: Tensor, group: Tensor, m: int) -> Tensor:
    """Size of merged tokens: how many tokens each represents, so that its key gets their total attention.

        log s = log sum_j I_j - sum_j w_j log(I_j / s_j),     w_j = I_j / sum_j I_j

    The sum of the s_j for tokens of equal importance per size; near s_j of one token that has nearly all importance.
    size, I, group: [B, n]; result [B, m].
    """
    total = group_sums(I, group, m)
    mean = group_sums(I * (I / size).log(), group, m) / total
    return total * (-mean).exp()


def group_sums(values: Tensor, group: Tensor, m: int) -> Tensor:
    """Sums of values [B, n] over each group: [B, m]. group: see `matching`."""
    if torch.compiler.is_exporting():
        return (_members(group, m, values.dtype) @ values.unsqueeze(-1)).squeeze(-1)
    return values.new_zeros(values.shape[0], m).scatter_add(1, group, values)


def _members(group: Tensor, m: int, dtype: torch.dtype) -> Tensor:
    """1 where a token is in a group, else 0: [B, m, n]. Runtimes multiply faster with it than they scatter."""
    return (group.unsqueeze(1) == torch.arange(m, device=group.device).unsqueeze(1)).to(dtype)


def count_up(like: Tensor) -> Tensor:
    """0, 1, 2 ... in every row of a tensor [B, n]."""
    return torch.arange(like.shape[1], device=like.device).expand_as(like)
