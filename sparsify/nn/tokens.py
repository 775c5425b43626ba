"""Fewer tokens: what is known of the tokens present, and the stages at which some leave (`docs/design.md`, section 6).

A stage stands in a block between its attention and its MLP. The prefix tokens stay; of the patch tokens a fixed number
goes on, the same for every image of a batch, and they are gathered, so that every later layer works on fewer rows.

    evit         the patch tokens with the highest importance go on (EViT, ICLR 2022)
    evit-fused   and one more: the mean of the others, weighted with their importance
    merge        similar tokens become one, those of little importance first (`sparsify.nn.merging`)

The importance I_j of a token is `sparsify.nn.importance`'s.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.nn.merging import count_up, effective_size, matching, rounds, weighted_mean

WAYS = ("merge", "evit", "evit-fused")


class TokenState(NamedTuple):
    """What is known of the tokens [B, P + n, C] of a layer, where they are not all the patches in order.

    Attributes:
        patches: n0, patch tokens at the first block.
        size: how many tokens each one stands for, prefix included, float32 [B, P + n]; None: 1 each.
        place: patch that each patch token stands on, int64 [B, n]; None: the n0 in order.
        owner: for every patch the token (counted without prefix) that it went into, int64 [B, n0], -1 where it was dropped;
            None: nobody asked for it, or nothing has left.
        seen: features of every patch when they were last seen, [B, n0, C]; None: nobody asked, or nothing has left.
        rope: sines and cosines of all places, [n0, 2d]; [blocks, H, n0, 2d] where every block has its own; None: none.
        bias: what the model adds to all logits by place, [1, H, P + n0, P + n0]; None: nothing.
    """

    patches: int
    size: Tensor | None = None
    place: Tensor | None = None
    owner: Tensor | None = None
    seen: Tensor | None = None
    rope: Tensor | None = None
    bias: Tensor | None = None

    def rope_of(self, block: int) -> Tensor | None:
        """The rotary embedding of a block's patch tokens where they stand: a merged one's is that of the token that the
        others went into. [n0, 2d], or [H, n0, 2d]; [B, 1 or H, n, 2d] once tokens have left."""
        rope = self.rope if self.rope is None or self.rope.ndim == 2 else self.rope[block]
        if rope is None or self.place is None:
            return rope
        if rope.ndim == 2:
            return rope[self.place].unsqueeze(1)
        return rope[:, self.place].transpose(0, 1)

    def bias_of(self, bias: Tensor | None, prefix: int) -> Tensor | None:
        """Rows and columns of a bias [1, H, P + n0, P + n0] of the tokens present, [B, H, P + n, P + n]; places as for
        `rope_of`."""
        if bias is None or self.place is None:
            return bias
        first = torch.arange(prefix, device=self.place.device).expand(len(self.place), -1)
        index = torch.cat([first, self.place + prefix], 1)  # (B, P + n)
        return bias[0][:, index.unsqueeze(2), index.unsqueeze(1)].transpose(0, 1)

    def moved(self, patch: Tensor, keep: Tensor, group: Tensor) -> TokenState:
        """After a step from the patch tokens [B, n, C] to those `keep` [B, m]; group [B, n]: see `matching`."""
        place = keep if self.place is None else self.place.gather(1, keep)
        if self.owner is None:
            return self._replace(place=place)
        seen = None if self.seen is None else self.spread(patch)
        owner = torch.where(self.owner < 0, self.owner, group.gather(1, self.owner.clamp_min(0)))
        return self._replace(place=place, owner=owner, seen=seen)

    def spread(self, patch: Tensor) -> Tensor:
        """Patch tokens [B, n, C] on the full grid [B, n0, C]: each patch has its token's features, or its last ones."""
        if self.owner is None:
            return patch
        index = self.owner.unsqueeze(-1)  # (B, n0, 1)
        if patch.shape[1] == 0:
            assert self.seen is not None
            return self.seen
        found = patch.gather(1, index.clamp_min(0).expand(-1, -1, patch.shape[-1]))  # (B, n0, C)
        return found if self.seen is None else torch.where(index < 0, self.seen, found)


class TokenStage(nn.Module):
    """One stage: patch tokens in, fewer patch tokens out.

    Args:
        way: one of `WAYS`.
        share: of the n0 patches, how many tokens go on: m = ceil(share n0 - 1e-9), at most those present; `evit-fused`
            adds one. 0: none, which only the prefix tokens survive.
        prefix: P.
    """

    def __init__(self, way: str, share: float, prefix: int) -> None:
        super().__init__()
        self.way, self.share, self.prefix = way, share, prefix

    def count(self, present: int, patches: int) -> int:
        """m, patch tokens that go on of `present` ones (without the fused token)."""
        return min(int(present), math.ceil(self.share * int(patches) - 1e-9))

    def forward(self, x: Tensor, I: Tensor, tokens: TokenState) -> tuple[Tensor, TokenState]:
        """x [B, P + n, C] and importance [B, n] -> [B, P + m, C] and what is known of them."""
        patch = x[:, self.prefix :]
        m = self.count(patch.shape[1], tokens.patches)
        if m == 0:
            return self.drop_all(x, tokens)
        if self.way == "merge":
            for left in rounds(int(patch.shape[1]), m):
                keep, group = matching(patch, I, left)  # (B, left), (B, n)
                size = self.sizes(tokens.size, I, group, left)
                tokens = tokens.moved(patch, keep, group)._replace(size=size)
                patch = weighted_mean(patch, I, group, left)
                I = I.new_zeros(I.shape[0], left).scatter_add(1, group, I)
        else:
            fuse = self.way == "evit-fused" and m < patch.shape[1]
            keep, group = ranking(I, m, fuse)
            tokens = tokens.moved(patch, keep, group)
            if fuse:
                patch = weighted_mean(patch, I, group, m + 1)
            else:
                patch = patch.gather(1, keep.unsqueeze(-1).expand(-1, -1, patch.shape[-1]))
        return torch.cat([x[:, : self.prefix], patch], 1), tokens

    def sizes(self, size: Tensor | None, I: Tensor, group: Tensor, m: int) -> Tensor:
        """Sizes after a merging, prefix tokens' included: [B, P + m]."""
        before = I.new_ones(I.shape[0], self.prefix + I.shape[1]) if size is None else size
        merged = effective_size(before[:, self.prefix :], I, group, m)
        return torch.cat([before[:, : self.prefix], merged], 1)

    def drop_all(self, x: Tensor, tokens: TokenState) -> tuple[Tensor, TokenState]:
        """Only the prefix tokens go on: x [B, P + n, C] -> [B, P, C]. Nothing of the patch tokens is computed any more."""
        seen, owner = tokens.seen, tokens.owner
        if owner is not None:
            seen = None if seen is None else tokens.spread(x[:, self.prefix :])
            owner = torch.full_like(owner, -1)
        size = None if tokens.size is None else tokens.size[:, : self.prefix]
        place = torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
        return x[:, : self.prefix], tokens._replace(size=size, place=place, owner=owner, seen=seen)

    def extra_repr(self) -> str:
        return f"way={self.way}, share={self.share:.4g}"


def ranking(I: Tensor, m: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """The m most important tokens in their order, equal ones by the lower index; with `fuse` the first of the others too.

    Returns:
        keep: int64 [B, m or m + 1], ascending; group: int64 [B, n], place in `keep`, -1 for the dropped.
    """
    order = I.argsort(dim=1, descending=True, stable=True)  # (B, n)
    keep = order[:, : m + fuse].sort(1).values
    group = torch.full_like(order, -1).scatter(1, keep, count_up(keep))
    if fuse:
        first = group.gather(1, order[:, m : m + 1])  # (B, 1) where the fused token stands
        group = group.masked_fill(group < 0, 0) + (group < 0) * first
    return keep, group
