"""Fewer tokens: the state of the tokens present, and the stages that remove some (`docs/design.md`, Fewer tokens).

A stage runs in a block between attention and MLP. The prefix tokens stay; the patch tokens are reduced to a fixed number,
the same for every image of a batch, and gathered, so that every later layer works on fewer rows.

    evit         the patch tokens with the highest importance are kept (EViT, ICLR 2022)
    evit-fused   and one more: the mean of the others, weighted with their importance
    merge        similar tokens are merged, unimportant ones first (`sparsify.nn.merging`)

The importance I_j of a token: `sparsify.nn.importance`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.nn import tokens_compared
from sparsify.nn.merging import candidates, count_up, effective_size, group_sums, matching, rounds, weighted_mean
from sparsify.ops.gpu import tokens as gpu

WAYS = ("merge", "evit", "evit-fused")


class TokenState(NamedTuple):
    """State of the tokens [B, P + n, C] of a layer in a model with token stages."""

    patches: int  # n0, number of patch tokens at the first block
    size: Tensor | None = None  # tokens that each one represents, prefix included, float32 [B, P + n]; None: 1 each
    place: Tensor | None = None  # patch whose position each patch token has, int64 [B, n]; None: the n0 in order
    # patch token that every patch is part of, int64 [B, n0], -1 where it was dropped; None: not tracked
    owner: Tensor | None = None
    seen: Tensor | None = None  # features of every patch when last computed, [B, n0, C]; None: not tracked
    rope: Tensor | None = None  # sines and cosines of all positions, [n0, 2d] or [blocks, H, n0, 2d]; None: none
    bias: Tensor | None = None  # what the model adds to all logits, [1, H, P + n0, P + n0]; None: nothing

    def rope_of(self, block: int) -> Tensor | None:
        """A block's rotary embedding at the positions of its patch tokens; a merged token has the position of the token
        that the others were merged into. [n0, 2d] or [H, n0, 2d]; [B, 1 or H, n, 2d] once tokens were removed."""
        rope = self.rope if self.rope is None or self.rope.ndim == 2 else self.rope[block]
        if rope is None or self.place is None:
            return rope
        if rope.ndim == 2:
            return rope[self.place].unsqueeze(1)
        return rope[:, self.place].transpose(0, 1)

    def bias_of(self, bias: Tensor | None, prefix: int) -> Tensor | None:
        """Rows and columns of a bias [1, H, P + n0, P + n0] for the tokens present, [B, H, P + n, P + n]; positions as in
        `rope_of`."""
        if bias is None or self.place is None:
            return bias
        first = torch.arange(prefix, device=self.place.device).expand(len(self.place), -1)
        index = torch.cat([first, self.place + prefix], 1)  # (B, P + n)
        return bias[0][:, index.unsqueeze(2), index.unsqueeze(1)].transpose(0, 1)

    def reduced(self, patch: Tensor, keep: Tensor, group: Tensor) -> TokenState:
        """The state after patch tokens [B, n, C] were reduced to `keep` [B, m]; group [B, n]: see `matching`, `ranking`."""
        return self.placed(patch, keep if self.place is None else self.place.gather(1, keep), group)

    def placed(self, patch: Tensor, place: Tensor, group: Tensor) -> TokenState:
        """The same, given the places [B, m] of the remaining tokens."""
        if self.owner is None:
            return self._replace(place=place)
        seen = None if self.seen is None else self.spread(patch)
        owner = torch.where(self.owner < 0, self.owner, group.gather(1, self.owner.clamp_min(0)))
        return self._replace(place=place, owner=owner, seen=seen)

    def spread(self, patch: Tensor) -> Tensor:
        """Patch tokens [B, n, C] on the full grid, [B, n0, C]: each patch has its token's features, or if dropped its last
        ones."""
        if self.owner is None:
            return patch
        if patch.shape[1] == 0:
            assert self.seen is not None
            return self.seen
        index = self.owner.unsqueeze(-1)  # (B, n0, 1)
        spread = patch.gather(1, index.clamp_min(0).expand(-1, -1, patch.shape[-1]))  # (B, n0, C)
        return spread if self.seen is None else torch.where(index < 0, self.seen, spread)


class TokenStage(nn.Module):
    """One stage: reduces the patch tokens.

    Args:
        way: one of `WAYS`.
        share: fraction of the n0 patches: m = ceil(share n0 - 1e-9) patch tokens are kept, at most those present;
            `evit-fused` adds one. 0: only the prefix tokens remain.
        prefix: P.
    """

    def __init__(self, way: str, share: float, prefix: int) -> None:
        super().__init__()
        self.way, self.share, self.prefix = way, share, prefix
        self.compares = False  # chooses by `sparsify.nn.tokens_compared`; see `comparing`

    def count(self, present: int, patches: int) -> int:
        """m, number of patch tokens kept of those `present`, without the fused token."""
        return min(int(present), math.ceil(self.share * int(patches) - 1e-9))

    def forward(self, x: Tensor, I: Tensor, tokens: TokenState) -> tuple[Tensor, TokenState]:
        """x [B, P + n, C] and importance [B, n] -> [B, P + m, C] and their state."""
        patch = x[:, self.prefix :]
        m = self.count(patch.shape[1], tokens.patches)
        if m == 0:
            return self.drop_all(x, tokens)
        if m < patch.shape[1] and not self.compares and gpu.takes(x, self.prefix):
            return self.by_kernels(x, I, m, tokens)
        match, rank = (tokens_compared.matching, tokens_compared.ranking) if self.compares else (matching, ranking)
        if self.way == "merge":
            for count in rounds(int(patch.shape[1]), m):
                keep, group = match(patch, I, count)  # (B, count), (B, n)
                size = self.sizes(tokens.size, I, group, count)
                tokens = tokens.reduced(patch, keep, group)._replace(size=size)
                patch = weighted_mean(patch, I, group, count)
                I = group_sums(I, group, count)
        else:
            fuse = self.way == "evit-fused" and m < patch.shape[1]
            keep, group = rank(I, m, fuse)
            tokens = tokens.reduced(patch, keep, group)
            if fuse:
                patch = weighted_mean(patch, I, group, m + 1)
            else:
                patch = patch.gather(1, keep.unsqueeze(-1).expand(-1, -1, patch.shape[-1]))
        # without prefix tokens nothing is joined: some runtimes cannot read a program with empty tensors
        return torch.cat([x[:, : self.prefix], patch], 1) if self.prefix else patch, tokens

    def by_kernels(self, x: Tensor, I: Tensor, m: int, tokens: TokenState) -> tuple[Tensor, TokenState]:
        """`forward` to m tokens, with the kernels of `sparsify.ops.gpu`."""
        P = self.prefix
        if self.way != "merge":
            fuse = self.way == "evit-fused"
            reduced, place, group = gpu.choose_tokens(x, I, tokens.place, P, m, fuse)
            return reduced, tokens.placed(x[:, P:], place, group)
        for count in rounds(x.shape[1] - P, m):
            looking = candidates(x.shape[1] - P, count)
            reduced, I, size, place, group = gpu.merge_tokens(x, I, tokens.size, tokens.place, P, count, looking)
            tokens = tokens.placed(x[:, P:], place, group)._replace(size=size)
            x = reduced
        return x, tokens

    def sizes(self, size: Tensor | None, I: Tensor, group: Tensor, m: int) -> Tensor:
        """Sizes after a round of merging, prefix tokens included: [B, P + m]."""
        before = I.new_ones(I.shape[0], self.prefix + I.shape[1]) if size is None else size
        merged = effective_size(before[:, self.prefix :], I, group, m)
        return torch.cat([before[:, : self.prefix], merged], 1) if self.prefix else merged

    def drop_all(self, x: Tensor, tokens: TokenState) -> tuple[Tensor, TokenState]:
        """Only the prefix tokens remain: x [B, P + n, C] -> [B, P, C]."""
        seen, owner = tokens.seen, tokens.owner
        if owner is not None:
            seen = None if seen is None else tokens.spread(x[:, self.prefix :])
            owner = torch.full_like(owner, -1)
        size = None if tokens.size is None else tokens.size[:, : self.prefix]
        place = torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
        return x[:, : self.prefix], tokens._replace(size=size, place=place, owner=owner, seen=seen)

    def extra_repr(self) -> str:
        return f"way={self.way}, share={self.share:.4g}"


@contextlib.contextmanager
def comparing(model: nn.Module, compares: bool = True) -> Iterator[None]:
    """Inside the context all stages of `model` choose by comparisons, for a program that is traced meanwhile."""
    stages = [module for module in model.modules() if isinstance(module, TokenStage)]
    try:
        for stage in stages:
            stage.compares = compares
        yield
    finally:
        for stage in stages:
            stage.compares = False


def ranking(I: Tensor, m: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """The m most important tokens in their order, ties by the lower index; with `fuse` also the first of the others.

    Returns:
        keep: int64 [B, m or m + 1], ascending.
        group: index in `keep` of the token that each token becomes part of, -1 where it is dropped, int64 [B, n].
    """
    order = I.argsort(dim=1, descending=True, stable=True)  # (B, n)
    keep = order[:, : m + fuse].sort(1).values
    group = torch.full_like(order, -1).scatter(1, keep, count_up(keep))
    if fuse:
        fused = group.gather(1, order[:, m : m + 1])  # (B, 1) index of the fused token
        group = group.masked_fill(group < 0, 0) + (group < 0) * fused
    return keep, group
