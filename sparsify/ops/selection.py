"""Which keys each query keeps: the scores of a ranking, tiles, masks, and the b highest of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.ops import selection, tails
from sparsify.ops.spec import Spec

HIDDEN = -1e4  # what is added to the logit of a key that may not be attended to is this or lower: e^HIDDEN is 0


def top_b(scores: Tensor, b: int) -> Tensor:
    """The b highest scores of each row, equal scores by the lower index; NaN is lowest.

    Args:
        scores: [..., N], float.
        b: keys kept in each row, 1 <= b <= N.

    Returns:
        bool [..., N], exactly b True in each row.
    """
    s = scores.detach().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    threshold = s.topk(b, dim=-1).values[..., -1:]  # (..., 1)
    kept = s >= threshold
    if not torch.compiler.is_compiling() and bool(
        (kept.sum(-1) == b).all()
    ):  # no ties at the threshold: the usual case
        return kept
    above, tie = s > threshold, s == threshold
    free = b - above.sum(-1, keepdim=True)  # (..., 1)
    return above | (tie & (tie.cumsum(-1) <= free))


def pool_tiles(scores: Tensor, grid: tuple[int, int], tile: tuple[int, int], place: Tensor | None = None) -> Tensor:
    """Scores shared by each tile of neighbouring queries: the highest, over its rows, of the score in standard deviations.

        z_ij = (s_ij - mean_j s_ij) / sd_j s_ij            over the keys that row i may attend to (finite scores)

    The maximum keeps what matters to any one of the rows, which their mean or the sum of their softmaxes does not
    (docs/tiles.md), and needs no exponentials.

    Args:
        scores: [B, H, n, N] for n patch queries.
        place: patch of `grid` that each query stands on, [B, n]; None: n = h*w, in order.

    Returns:
        [B, H, n, N], equal rows inside a tile; keys that no row of the tile may attend to have -inf.
    """
    h, w = grid
    cols = -(-w // tile[1])
    y = torch.arange(h, device=scores.device) // tile[0]
    x = torch.arange(w, device=scores.device) // tile[1]
    t = (y[:, None] * cols + x).flatten()  # (h*w)
    tiles = -(-h // tile[0]) * cols
    t = t.expand(scores.shape[0], -1) if place is None else t[place]  # (B, n)
    t = t[:, None, :, None].expand_as(scores)  # (B, H, n, N)
    s = scores.detach()
    seen = s.isfinite()
    count = seen.sum(-1, keepdim=True).clamp_min(1)
    centred = (s - s.masked_fill(~seen, 0).sum(-1, keepdim=True) / count).masked_fill(~seen, 0)
    sd = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    z = (centred / sd.masked_fill(sd == 0, 1)).masked_fill(~seen, -torch.inf)
    pooled = z.new_full((*z.shape[:2], tiles, z.shape[-1]), -torch.inf)
    return pooled.scatter_reduce(2, t, z, "amax").gather(2, t)


def alive(mask: Tensor, q: Tensor) -> Tensor:
    """1 for keys that some query may attend to, else 0: [B, H, N], dtype of q."""
    B, H, N, _ = q.shape
    return (_bias(mask, q.dtype) > HIDDEN).expand(B, H, N, N).any(-2).to(q.dtype)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return mask.to(dtype)


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
        bias = selection._bias(mask, scores.dtype)
        scores = scores + torch.where(bias > selection.HIDDEN, bias * ranking.ranked, bias)
    if P == N:
        return torch.ones_like(scores, dtype=torch.bool)
    patch = scores[:, :, P:]
    if spec.tile:
        patch = selection.pool_tiles(patch, _grid(spec, N - P, place), (spec.tile[0], spec.tile[1]), place)
    return torch.nn.functional.pad(selection.top_b(patch, spec.budget), (0, 0, P, 0), value=True)


def cells(
    ranking: Ranking, mask: Tensor | None, size: Tensor | None, spec: Spec, place: Tensor | None
) -> Tensor | None:
    """The tail's cell of every key, int64 [B, H, N]; None: no tail. size [B, N]: as `reference.attend` takes it."""
    if spec.tail == "none":
        return None
    f = ranking.features
    B, H, N, _ = f.shape
    weight = None if mask is None else selection.alive(mask, f)
    if size is not None:
        own = size.to(f.dtype)[:, None].expand(B, H, N)
        weight = own if weight is None else weight * own
    P = min(spec.prefix, N)
    return tails.assign(spec.tail, f, weight, P, _grid(spec, N - P, place), (spec.cells[0], spec.cells[1]), place)


def _grid(spec: Spec, n: int, place: Tensor | None) -> tuple[int, int]:
    grid = (spec.grid[0], spec.grid[1])
    return grid if place is not None else tails.patch_grid(n, grid)
