"""What one sparse attention call keeps, and what weight it gives: written out, for pictures and tests.

The ops never write these out. Keys are chosen by the same functions of the same scores (`reference.top_b`,
`reference.pool_tiles`), and the weights are those of equation 3 of `docs/design.md`; the tests hold both against what the
ops give for values that are unit vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.ops import reference, tails
from sparsify.ops.spec import Spec


class Ranking(NamedTuple):
    """What a predictor makes of queries and keys.

    Attributes:
        row, col: their product row @ col' ranks the keys; [B, H, N, r] each, or [B or 1, H or 1, N, r] (col).
        features: of the keys, which `clusters` compares, [B, H, N, *].
        shift: added to the scores of every row, [B, N]; None: nothing.
        ranked: factor of the mask in the scores; 0: only what it hides counts there.
    """

    row: Tensor
    col: Tensor
    features: Tensor
    shift: Tensor | None
    ranked: float

    def head(self, h: int) -> Ranking:
        """The same of one head, counted from 0."""
        col = self.col if self.col.shape[1] == 1 else self.col[:, h : h + 1]
        return Ranking(self.row[:, h : h + 1], col, self.features[:, h : h + 1], self.shift, self.ranked)


def kept(ranking: Ranking, mask: Tensor | None, spec: Spec, place: Tensor | None) -> Tensor:
    """The keys that each row keeps: bool [B, H, N, N], all of them for the prefix rows.

    mask, place: as `reference.attend` takes them.
    """
    scores = ranking.row @ ranking.col.mT  # (B, H, N, N)
    B, H, N, _ = scores.shape
    P = min(spec.prefix, N)
    if ranking.shift is not None:
        scores = scores + ranking.shift.to(scores.dtype)[:, None, None]
    if mask is not None:
        bias = reference._bias(mask, scores.dtype)
        scores = scores + torch.where(bias > reference.HIDDEN, bias * ranking.ranked, bias)
    if P == N:
        return torch.ones_like(scores, dtype=torch.bool)
    patch = scores[:, :, P:]
    if spec.tile:
        patch = reference.pool_tiles(patch, _grid(spec, N - P, place), (spec.tile[0], spec.tile[1]), place)
    return torch.nn.functional.pad(reference.top_b(patch, spec.budget), (0, 0, P, 0), value=True)


def cells(
    ranking: Ranking, mask: Tensor | None, size: Tensor | None, spec: Spec, place: Tensor | None
) -> Tensor | None:
    """The tail's cell of every key, int64 [B, H, N]; None: no tail. size [B, N]: as `reference.attend` takes it."""
    if spec.tail == "none":
        return None
    f = ranking.features
    B, H, N, _ = f.shape
    weight = None if mask is None else reference.alive(mask, f)
    if size is not None:
        own = size.to(f.dtype)[:, None].expand(B, H, N)
        weight = own if weight is None else weight * own
    P = min(spec.prefix, N)
    return tails.assign(spec.tail, f, weight, P, _grid(spec, N - P, place), (spec.cells[0], spec.cells[1]), place)


def weights(
    q: Tensor, k: Tensor, kept: Tensor, a: Tensor | None, bias: Tensor | None, size: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights that rows of the attention give to the keys they keep, and to their tail; both together sum to 1.

    Args:
        q: [B, H, rows, d]; k: [B, H, N, d].
        kept: bool [B, H, rows, N]; a: cells of the keys, see `cells`.
        bias: additive mask of these rows, [B, H, rows, N]; None: none.
        size: [B, N]; None: 1 each.

    Returns:
        [B, H, rows, N], 0 where a key was dropped; [B, H, rows].
    """
    plain = (q @ k.mT) * scale  # (B, H, rows, N)
    share = torch.ones_like(plain) if bias is None else bias.exp()  # what a key counts for a row
    if size is not None:
        share = share * size.to(q.dtype)[:, None, None]
    logits = (plain + share.log()).masked_fill(~kept, -torch.inf)
    if a is None:
        weight = logits.softmax(-1).nan_to_num()
        return weight, torch.zeros_like(weight[..., 0])
    member = torch.nn.functional.one_hot(a, int(a.max()) + 1).to(q.dtype)  # (B, H, N, m)
    dropped = share.masked_fill(kept, 0) @ member  # (B, H, rows, m)
    if bias is not None and bool((bias <= reference.HIDDEN).any()):  # every row has its own cell means
        mean = (share * plain) @ member / (share @ member).clamp_min(torch.finfo(q.dtype).tiny)
    else:
        sized = member if size is None else member * size.to(q.dtype)[:, None, :, None]
        mean = plain @ sized / sized.sum(-2, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    tail = mean.masked_fill(dropped == 0, -torch.inf) + dropped.log()
    both = torch.cat([logits, tail], -1).softmax(-1).nan_to_num()
    return both[..., : k.shape[2]], both[..., k.shape[2] :].sum(-1)


def dense(q: Tensor, k: Tensor, bias: Tensor | None, size: Tensor | None, scale: float) -> Tensor:
    """Softmax over all keys, which no predictor chose from: [B, H, rows, N]; arguments as `weights`."""
    logits = (q @ k.mT) * scale
    if size is not None:
        logits = logits + size.to(q.dtype).log()[:, None, None]
    return (logits if bias is None else logits + bias).softmax(-1).nan_to_num()


def additive(mask: Tensor | None, like: Tensor, N: int) -> Tensor | None:
    """The mask as it is added to the logits, [B, H, N, N]; B, H and dtype of `like` [B, H, *, *]."""
    if mask is None:
        return None
    return reference._bias(mask, like.dtype).expand(like.shape[0], like.shape[1], N, N)


def _grid(spec: Spec, n: int, place: Tensor | None) -> tuple[int, int]:
    grid = (spec.grid[0], spec.grid[1])
    return grid if place is not None else tails.patch_grid(n, grid)
