"""The same attention at many settings in one pass, for some of the rows: what a calibration compares.

One ranking serves every budget: with keys in the order of their scores, what a budget keeps is a running sum. Values are
those of `reference.attend` to rounding, without sizes, places or a mask that hides keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.ops import selection, tails
from sparsify.ops.selection import Context, Ranking
from sparsify.ops.spec import Grid, Spec


class Rows:
    """Rows of the attention of one call, by any ranking, at many budgets and grids of cells.

    Args:
        q, k, v: [B, H, N, d], float32.
        bias: added to the logits, broadcastable to [B, H, N, N]; None: nothing.
        rows: the rows that are computed, R indices of patch tokens, int64.
        spec: the call's constants; budgets and cells are those of `outputs`.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor, spec: Spec) -> None:
        self.q, self.k, self.v, self.rows, self.spec = q, k, v, rows, spec
        self.asking = q[:, :, rows]  # (B, H, R, d)
        logits = (self.asking @ k.mT) * spec.scale  # (B, H, R, N)
        self.share = None  # what a key counts for a row, (B, H, R, N)
        self.bias = None if bias is None else bias.to(q.dtype).expand(*q.shape[:2], q.shape[2], q.shape[2])
        if self.bias is not None:
            logits = logits + self.bias[:, :, rows]
            self.share = self.bias[:, :, rows].exp()
        self.top = logits.amax(-1, keepdim=True)  # (B, H, R, 1)
        self.weight = (logits - self.top).exp()  # (B, H, R, N)
        self.dense = self.weight @ v / self.weight.sum(-1, keepdim=True)  # (B, H, R, d)

    def outputs(self, ranking: Ranking, budgets: Sequence[int], cells: Sequence[Grid]) -> Iterator[Tensor]:
        """For each grid of `cells` the rows at every budget (ascending), [B, H, R, K, d].

        ranking: of q and k, written out; equal scores are kept in any order.
        """
        (B, H, R, _), K = self.asking.shape, len(budgets)
        order = self._order(ranking, max(budgets))  # (B, H, R, most)
        kept = self.weight.gather(-1, order)
        last = torch.tensor(budgets, device=order.device) - 1
        total = kept.cumsum(-1)[..., last]  # (B, H, R, K)
        values = self._values(order, kept, budgets)  # (B, H, R, K, d)
        tail = tails.TAILS[self.spec.tail]
        places = torch.arange(max(budgets), device=order.device)
        step = torch.searchsorted(last, places)  # the first budget that keeps each place, (most)
        for grid in cells:
            if not tail.stands_for_dropped_keys:
                yield values / total.unsqueeze(-1)
                continue
            one = self.spec._replace(cells=(grid,))
            cell, M = selection.cells_of(tail, ranking, Context(self.bias), one)  # (B, H, N), P prefix cells included
            member = functional.one_hot(cell, M).to(self.v.dtype)  # (B, H, N, M)
            size = member.sum(-2, keepdim=True)  # (B, H, 1, M)
            mean = (member / size.clamp_min(1)).mT  # (B, H, M, N)
            one_each = (self.asking @ (mean @ self.k).mT * self.spec.scale - self.top).exp()  # (B, H, R, M)
            held = size.expand(B, H, R, M) if self.share is None else self.share @ member
            counted = torch.ones_like(kept) if self.share is None else self.share.gather(-1, order)
            at = step * M + cell.unsqueeze(2).expand(B, H, R, -1).gather(-1, order)
            gone = counted.new_zeros(B, H, R, K * M).scatter_add(-1, at, counted).unflatten(-1, (K, M)).cumsum(-2)
            mass = (held.unsqueeze(-2) - gone).clamp_min(0) * one_each.unsqueeze(-2)  # (B, H, R, K, M)
            stands = (mass.flatten(2, 3) @ (mean @ self.v)).view_as(values)
            yield (values + stands) / (total + mass.sum(-1)).unsqueeze(-1)

    def _order(self, ranking: Ranking, most: int) -> Tensor:
        """The keys with the highest scores, best first: int64 [B, H, R, most]."""
        assert ranking.row is not None and ranking.col is not None
        if not self.spec.tile:
            scores = ranking.row[:, :, self.rows] @ ranking.col.mT
            if self.bias is not None:
                scores = scores + self.bias[:, :, self.rows] * ranking.ranked
            return scores.topk(most, dim=-1).indices
        scores, P = ranking.row @ ranking.col.mT, self.spec.prefix
        if self.bias is not None:
            scores = scores + self.bias * ranking.ranked
        grid = selection.grid_of(self.spec, scores.shape[2] - P, None)
        pooled = selection.pool_tiles(scores[:, :, P:], grid, (self.spec.tile[0], self.spec.tile[1]))
        return pooled[:, :, self.rows - P].topk(most, dim=-1).indices

    def _values(self, order: Tensor, weight: Tensor, budgets: Sequence[int]) -> Tensor:
        """Sums of the weighted values of the first b keys of `order`, for every budget: [B, H, R, K, d]."""
        B, H, N, d = self.v.shape
        first = torch.arange(B * H, device=order.device).view(B, H, 1, 1) * N
        index, weight = (order + first).flatten(0, 2), weight.flatten(0, 2)  # (B*H*R, most)
        table = self.v.reshape(B * H * N, d)
        parts, start = [], 0
        for b in budgets:
            own = slice(start, b)
            parts.append(functional.embedding_bag(
                index[:, own].contiguous(), table, per_sample_weights=weight[:, own].contiguous(), mode="sum"
            ))  # fmt: skip
            start = b
        return torch.stack(parts, 1).cumsum(1).view(B, H, -1, len(budgets), d)
