"""What a setting of a head costs in measured time, for schedules that are to meet a latency.

A kept pair costs far more time than a score of as many multiply-accumulates: keys are gathered, scores are one dense
product. One block's attention is timed with all its heads at the middle setting, and with one of rank, keep and cells at its
ends; in between the time is interpolated, and what the three add is added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from sparsify.config import BlockPlan
from sparsify.fit.calibrate.budgets import BlockErrors, Budgets, Settings
from sparsify.measure.latency import interleaved
from sparsify.nn.attention import SparseAttention, attention_modules
from sparsify.ops.spec import budget

ROUNDS = 9

Index = tuple[int, int, int]  # of a rank, a keep and a grid of cells


@torch.no_grad()
def timed(model: nn.Module, budgets: Budgets, batch: int) -> Budgets:
    """The same budgets with costs in milliseconds of one image, timed on this machine; model: grafted by the calibration.

    All blocks of a plain ViT are alike: the middle one of those that spend anything is timed.
    """
    if not budgets.blocks:
        return budgets
    which = sorted(budgets.blocks)[len(budgets.blocks) // 2]
    module = cast(SparseAttention, list(attention_modules(model).values())[which])
    settings, heads = budgets.blocks[which].settings, budgets.shape.heads
    like, shape = next(model.parameters()), (batch, heads, budgets.shape.tokens, budgets.shape.head_dim)
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(like)
    runs: dict[Index, Callable[[], object]] = {}
    for at in _tried(settings):
        plan = _plan(settings, at, heads)
        runs[at] = partial(module.with_plan(plan).attend, q, k, v, None, None)
    times: dict[Any, float] = {
        at: t.median / batch / heads for at, t in interleaved(cast(Any, runs), rounds=ROUNDS, device=q.device).items()
    }
    return replace(
        budgets, blocks={i: _priced(block, times, budgets.shape.tokens) for i, block in budgets.blocks.items()}
    )


def _tried(settings: Settings) -> list[Index]:
    """The middle setting, and those with one of the three at an end."""
    middle = tuple(n // 2 for n in settings.shape)
    ends = [(*middle[:axis], end, *middle[axis + 1 :]) for axis, n in enumerate(settings.shape) for end in (0, n - 1)]
    return list(dict.fromkeys(cast(list[Index], [middle, *ends])))


def _plan(settings: Settings, at: Index, heads: int) -> BlockPlan:
    return BlockPlan((settings.keeps[at[1]],), (settings.ranks[at[0]],) * heads, (settings.cells[at[2]],))


def _priced(block: BlockErrors, times: dict[Index, float], tokens: int) -> BlockErrors:
    """A block's errors with the time of each setting; `times`: of settings of a block with the same ones."""
    settings, tried = block.settings, _tried(block.settings)
    sizes: Sequence[Sequence[int]] = (
        settings.ranks,
        [budget(keep, tokens) for keep in settings.keeps],
        [rows * columns for rows, columns in settings.cells],
    )
    middle, costs = tried[0], np.full(settings.shape, times[tried[0]])
    for axis, values in enumerate(sizes):
        own = sorted({at[axis] for at in tried if at[:axis] + at[axis + 1 :] == middle[:axis] + middle[axis + 1 :]})
        known = [times[cast(Index, (*middle[:axis], i, *middle[axis + 1 :]))] for i in own]
        known = list(np.maximum.accumulate(known))  # more never takes less time: that is noise
        added = np.interp(values, [values[i] for i in own], known) - known[own.index(middle[axis])]
        costs = costs + added.reshape([-1 if i == axis else 1 for i in range(3)])
    return replace(block, costs=torch.from_numpy(np.maximum(costs, 0.01 * times[middle])))
