"""Which keys each query keeps: a predictor's ranking, masks and sizes, tiles, and the b highest scores of a row.

Every implementation in PyTorch chooses here (`reference`, `masked`, `weights`); the C++ kernels are tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.ops import tails
from sparsify.ops.spec import Grid, Spec

HIDDEN = -1e4  # what is added to the logit of a key that may not be attended to is this or lower: e^HIDDEN is 0


class Context(NamedTuple):
    """What is known of the keys beside k and v.

    A mask is bool (True: may attend) or additive. Keys that it hides (`HIDDEN` or lower is added) are neither kept nor in
    the tail; where it hides nothing it is a bias of the logits.
    """

    mask: Tensor | None = None  # broadcastable to [B, H, N, N]; None: none
    size: Tensor | None = None  # tokens that each key stands for, float [B, N], above 0; None: 1 each
    place: Tensor | None = None  # patch of `Spec.grid` of each patch token, int64 [B, N - P]; None: the grid in order
    cell: Tensor | None = None  # of every key, int64 [B, H, N] (`tails.ASSIGNED`); None: `Spec.tail` assigns them


class Ranking(NamedTuple):
    """What a predictor makes of queries and keys: the product row @ col' ranks the keys."""

    row: Tensor | None  # [B, H, N, r]; None: the first ranks[h] coordinates of q and k are the rows and columns
    col: Tensor | None  # [B, H, N, r], or [B or 1, H or 1, N, r]
    features: Tensor | None  # of the keys, compared by the `clusters` tail, [B, H, N, *]; None: those of col
    shift: Tensor | None  # added to the scores of every row, [B, N]; None: nothing
    ranked: float  # an additive mask times this is added to the scores; 0: the mask only hides keys
    ranks: tuple[int, ...]  # coordinates of each head, 1 <= r; columns of row and col past a head's own do not count
    macs: int = 0  # multiply-accumulates of the predictor for one image, all scores included

    def written(self, q: Tensor, k: Tensor) -> Ranking:
        """The same with row, col [B or 1, H or 1, N, r] and features written out; q, k: [B, H, N, d]."""
        row, col = self.row, self.col
        if row is None or col is None:
            row, col = q[..., : max(self.ranks)], k[..., : max(self.ranks)]
        if min(self.ranks) < col.shape[-1]:
            col = col * rank_mask(self.ranks, col)
        features = col.expand(*row.shape[:2], -1, -1) if self.features is None else self.features
        return self._replace(row=row, col=col, features=features)

    def to(self, dtype: torch.dtype) -> Ranking:
        """The same with tensors of that dtype."""
        row, col, features, shift = (None if t is None else t.to(dtype) for t in self[:4])
        return self._replace(row=row, col=col, features=features, shift=shift)

    def head(self, h: int) -> Ranking:
        """One head of a written ranking, counted from 0."""
        one = slice(h, h + 1)
        row, col, features = (t if t is None or t.shape[1] == 1 else t[:, one] for t in self[:3])
        return self._replace(row=row, col=col, features=features, ranks=self.ranks[one])


def rank_mask(ranks: Sequence[int], like: Tensor) -> Tensor:
    """1 for the first ranks[h] coordinates of head h, else 0: [H, 1, max(ranks)], dtype and device of `like`."""
    r = of_heads(ranks, like)
    return (torch.arange(max(ranks), device=like.device) < r).to(like.dtype)


def of_heads(values: Sequence[int], like: Tensor) -> Tensor:
    """Numbers of each head: int64 [H, 1, 1] on the device of `like`, without waiting for that device."""
    if like.device.type == "cpu" or torch.compiler.is_compiling():
        return torch.tensor(tuple(values), device=like.device)[:, None, None]
    filled = [torch.full((1, 1, 1), value, dtype=torch.int64, device=like.device) for value in values]
    return torch.cat(filled)  # a copy from the CPU's memory waits for the GPU, and cannot be captured


def top_b(scores: Tensor, budgets: int | Sequence[int]) -> Tensor:
    """The b highest scores of each row, equal scores by the lower index; NaN is lowest.

    Args:
        scores: [..., N], float; [..., H, rows, N] where heads differ.
        budgets: b, keys kept in each row, 1 <= b <= N; several: of each head.

    Returns:
        bool [..., N], exactly b True in each row.
    """
    s = scores.detach().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    each = (budgets,) if isinstance(budgets, int) else tuple(budgets)
    highest, b = s.topk(max(each), dim=-1).values, each[0] if len(each) == 1 else of_heads(each, s)
    threshold = highest[..., -1:]  # (..., 1)
    if isinstance(b, Tensor):
        threshold = highest.gather(-1, (b - 1).expand(threshold.shape))
    kept = s >= threshold
    if readable(s):
        without_ties = bool((kept.sum(-1, keepdim=True) == b).all())  # the usual case
        if without_ties:
            return kept
    above, tie = s > threshold, s == threshold
    free = b - above.sum(-1, keepdim=True)  # (..., 1)
    return above | (tie & (tie.cumsum(-1) <= free))


def readable(t: Tensor) -> bool:
    """Whether Python can look at values at once: on the CPU, no compiler, no fake tensor, no transformation of torch.func.

    On a GPU a look waits for all work before it, and a CUDA graph cannot be captured.
    """
    hidden = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return type(t) is Tensor and t.device.type == "cpu" and not hidden


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


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as it is added to the logits: -inf where a bool mask hides a key; the shape stays."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return mask.to(dtype)


def bias_of(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask of a call as it is added to the logits, [B, H, N, N], dtype of q [B, H, N, d]."""
    B, H, N, _ = q.shape
    return None if mask is None else additive(mask, q.dtype).expand(B, H, N, N)


def alive(mask: Tensor, q: Tensor) -> Tensor:
    """1 for keys that some query may attend to, else 0: [B, H, N], dtype of q."""
    B, H, N, _ = q.shape
    return (additive(mask, q.dtype) > HIDDEN).expand(B, H, N, N).any(-2).to(q.dtype)


def grid_of(spec: Spec, n: int, place: Tensor | None) -> Grid:
    """The grid on which n patch tokens stand: `spec.grid` where they have places of their own."""
    return spec.grid if place is not None else tails.patch_grid(n, spec.grid)


def selector(ranking: Ranking, context: Context, spec: Spec) -> Callable[[slice], Tensor]:
    """The choice of keys: a function from a slice of the query rows to the keys that they keep.

    Args:
        ranking: written out (`Ranking.written`).

    Returns:
        rows -> bool [B, H, rows, N]: b keys of each patch row, all keys of the P prefix rows.
    """
    row, col = ranking.row, ranking.col
    assert row is not None and col is not None
    N = row.shape[2]
    P = min(spec.prefix, N)
    added = _added(ranking, context, row)  # ([B or 1, H or 1,] N or 1, N) or None
    if spec.tile and P < N:
        scores = _plus(row @ col.mT, added)[:, :, P:]
        pooled = pool_tiles(scores, grid_of(spec, N - P, context.place), (spec.tile[0], spec.tile[1]), context.place)
        whole = torch.nn.functional.pad(top_b(pooled, spec.budgets), (0, 0, P, 0), value=True)
        return lambda rows: whole[:, :, rows]

    def of_rows(rows: slice) -> Tensor:
        scores = row[:, :, rows] @ col.mT
        bias = added if added is None or added.shape[-2] == 1 else added[..., rows, :]
        prefix = torch.arange(N, device=row.device)[rows] < P  # (rows)
        return top_b(_plus(scores, bias), spec.budgets) | prefix[:, None]

    return of_rows


def kept(ranking: Ranking, context: Context, spec: Spec) -> Tensor:
    """The keys that all rows keep: bool [B, H, N, N]; see `selector`."""
    return selector(ranking, context, spec)(slice(None))


def cells(ranking: Ranking, context: Context, spec: Spec) -> tuple[Tensor | None, int]:
    """The tail's cell of every key, int64 [B, H, N], and how many cells there are, the P prefix keys' included.

    None and 0 where there is no tail. ranking: written out.
    """
    if context.cell is not None:
        return context.cell, min(spec.prefix, context.cell.shape[2]) + spec.cells[0][0] * spec.cells[0][1]
    tail = tails.TAILS[spec.tail]
    return cells_of(tail, ranking, context, spec) if tail.stands_for_dropped_keys else (None, 0)


def cells_of(tail: tails.Tail, ranking: Ranking, context: Context, spec: Spec) -> tuple[Tensor, int]:
    """`cells` of any tail; heads with fewer cells than others leave their last ones empty."""
    features = ranking.features
    assert features is not None
    B, H, N, _ = features.shape
    P = min(spec.prefix, N)
    grid = grid_of(spec, N - P, context.place)
    weight = None if context.mask is None else alive(context.mask, features)  # (B, H, N)
    if context.size is not None:
        size = context.size.to(features.dtype)[:, None].expand(B, H, N)
        weight = size if weight is None else weight * size
    if len(spec.cells) == 1:
        return tail.assign(features, weight, P, grid, spec.cells[0], context.place), P + tail.count(grid, spec.cells[0])
    heads = [_of(h, features, weight) for h in range(H)]
    found = [tail.assign(*own, P, grid, shape, context.place) for own, shape in zip(heads, spec.cells, strict=True)]
    return torch.cat(found, 1), P + max(tail.count(grid, shape) for shape in spec.cells)


def _added(ranking: Ranking, context: Context, like: Tensor) -> Tensor | None:
    """What mask and sizes add to the scores."""
    added = None
    if context.mask is not None:
        bias = additive(context.mask, like.dtype)
        added = torch.where(bias > HIDDEN, bias * ranking.ranked, bias)
    if ranking.shift is not None:
        added = ranking.shift.to(like.dtype)[:, None, None] + (0 if added is None else added)
    return added


def _of(h: int, features: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Those of head h."""
    return features[:, h : h + 1], None if weight is None else weight[:, h : h + 1]


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
