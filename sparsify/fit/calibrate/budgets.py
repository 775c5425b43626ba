"""A budget of MACs, spent over the heads: rank, keep and cells of every head, chosen together.

Error of a head at a setting: squared difference between its sparse and its dense output after `proj`, measured on dense
activations at all settings in one pass (`sparsify.ops.settings`), for some rows of some images. Weight of its block: the
distance of the model's output from the dense one when that block alone is sparse, divided by the block's error at the same
setting. Weighted errors add up over heads to within the noise of the measurement (docs/design.md), so that

    minimise  sum_h  error_h(r_h, b_h, M_h)      with   sum_h  cost_h(r_h, b_h, M_h)  <=  budget

is solved by one price of a MAC for all heads: each takes the setting with the least error + price * cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparsify.config import BlockPlan, Geometry, SparsityConfig, grid_of
from sparsify.nn.predictor import HeadLowrankPredictor
from sparsify.ops.macs import sparse_macs
from sparsify.ops.spec import Grid, Spec, budget

RANKS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # of the asked rank, to multiples of STEP
KEEPS = (0.15, 0.3, 0.5, 0.75, 1.0, 1.5, 2.25, 3.5)  # of the asked keep
CELLS = (0.08, 0.2, 0.5, 1.0, 1.5, 2.2)  # of the number of cells for it
STEP = 4  # ranks move four at a time: a multiple of what each vector width takes of a row of scores
STEPS = 60  # of the bisection of the price

T = TypeVar("T")


class Settings(NamedTuple):
    """What the heads of a block may have; all combinations."""

    ranks: tuple[int, ...]  # ascending
    keeps: tuple[float, ...]  # ascending, with different budgets
    cells: tuple[Grid, ...]  # ascending numbers

    @property
    def shape(self) -> tuple[int, int, int]:
        """Ranks, keeps, cells."""
        return len(self.ranks), len(self.keeps), len(self.cells)

    def nearest(self, rank: int, keep: float, cells: Grid) -> tuple[int, int, int]:
        """Indices of the setting that is nearest to these."""
        count = cells[0] * cells[1]
        return (
            min(range(len(self.ranks)), key=lambda i: abs(self.ranks[i] - rank)),
            min(range(len(self.keeps)), key=lambda i: abs(self.keeps[i] - keep)),
            min(range(len(self.cells)), key=lambda i: abs(self.cells[i][0] * self.cells[i][1] - count)),
        )


def spends(config: SparsityConfig) -> bool:
    """Whether a calibration of `config` spends anything over the heads."""
    return config.predictor == "head-lowrank" and config.spread != "none" and isinstance(config.rank, int)


def settings(config: SparsityConfig, plans: Sequence[BlockPlan], N: int, head_dim: int) -> Settings | None:
    """What the heads of a block may have whose plan is to be one of `plans`; None where nothing is spent there.

    config: the requested one, which says what may move; N: tokens of the model.
    """
    found = [(p.keeps[0], p.cells[0]) for p in plans if p.keeps is not None and len(p.keeps) == 1 and p.keeps[0] < 1]
    if not spends(config) or not found:
        return None
    rank, moves = plans[0].ranks[0], config.spread == "all"
    ranks = {rank} | {r for f in RANKS if STEP <= (r := STEP * round(f * rank / STEP)) <= head_dim}
    keeps, grids = {budget(keep, N): keep for keep, _ in found}, {_number(cells): cells for _, cells in found}
    if moves:
        keeps = _between(
            keeps, {budget(x, N): x for keep, _ in found for f in KEEPS if (x := float(f"{f * keep:.4g}")) < 1}
        )
    if moves and config.cells is None and config.tail in ("cells", "clusters"):
        grids = _between(grids, {_number(g): g for _, own in found for f in CELLS for g in [grid_of(f * _number(own))]})
    return Settings(tuple(sorted(ranks)), tuple(keeps.values()), tuple(grids.values()))


def _between(asked: dict[int, T], others: dict[int, T]) -> dict[int, T]:
    """All of `asked`, and those of `others` that are not within a fifth of one below; ascending."""
    found: dict[int, T] = {}
    for n in sorted(asked | others):
        if n in asked or not found or n >= 1.2 * max(found):
            found[n] = asked.get(n, others.get(n))  # type: ignore[assignment]
    return found


def _number(cells: Grid) -> int:
    return cells[0] * cells[1]


def costs(
    settings: Settings, N: int, head_dim: int, folded: bool, spec: Spec, cells: Sequence[Grid] | None = None
) -> Tensor:
    """MACs of one head at each setting, for N tokens: float64 `settings.shape`. spec: the constants that do not move.

    cells: what the grids of `settings` are where tokens were removed; None: themselves.
    """
    found = []
    for r, keep, grid in product(settings.ranks, settings.keeps, cells or settings.cells):
        predictor = HeadLowrankPredictor(head_dim, (r,), folded)
        own = spec._replace(budgets=(budget(keep, N),), cells=(grid,))
        shape, macs = (1, 1, N, head_dim), predictor.macs(N, min(spec.prefix, N))
        found.append(
            sparse_macs(shape, macs, predictor.shared(1), predictor.compared(1, head_dim), own, placed=True).total()
        )
    return torch.tensor(found, dtype=torch.float64).view(settings.shape)


@dataclass(frozen=True)
class BlockErrors:
    """Errors of the heads of one block at every setting, and what a setting costs."""

    settings: Settings
    errors: Tensor  # [H, *settings.shape], float64, weighted
    costs: Tensor  # [*settings.shape], MACs of one head

    def ordered(self) -> BlockErrors:
        """A copy in which more rank, more keys or more cells never count as worse: that is noise of the measurement."""
        errors = self.errors
        for axis in (1, 2, 3):
            errors = errors.flip(axis).cummax(axis).values.flip(axis)
        return BlockErrors(self.settings, errors, self.costs)

    def at(self, plan: BlockPlan) -> tuple[int, int, int]:
        """Indices of the setting of a plan that is the same for all heads."""
        assert plan.keeps is not None
        return self.settings.nearest(plan.ranks[0], plan.keeps[0], plan.cells[0])

    def cost(self, plan: BlockPlan) -> float:
        """MACs of all heads by one of this block's own plans."""
        assert plan.keeps is not None
        each = zip(plan.ranks, plan.keeps, plan.cells, strict=True)
        return sum(float(self.costs[self.settings.nearest(*setting)]) for setting in each)

    def plan(self, chosen: Sequence[int]) -> BlockPlan:
        """The plan of the settings with these flat indices, one for each head."""
        every = list(product(*self.settings))
        ranks, keeps, cells = zip(*[every[i] for i in chosen], strict=True)
        return BlockPlan(keeps, ranks, cells)


@dataclass(frozen=True)
class Budgets:
    """What keeps cost in a model, spent over its heads; measured once, for any of them.

    `blocks`: weighted errors of the blocks where something is spent; the others have the configuration's own values.
    """

    config: SparsityConfig  # as requested
    shape: Geometry
    blocks: Mapping[int, BlockErrors]

    def uniform(self, keep: Any) -> tuple[BlockPlan, ...]:
        """The plans by which all heads have this keep (a value of `SparsityConfig.keep`)."""
        return self.config.model_copy(update={"keep": keep}).resolved(self.shape)

    def model(self, keep: Any) -> SparsityConfig:
        """The configuration in which what this keep costs everywhere is spent over all heads of all blocks."""
        if not self.blocks:
            return self.config.model_copy(update={"keep": keep}).with_cells(self.shape.tokens)
        plans, blocks, total = list(self.uniform(keep)), {}, 0.0
        for i, block in self.blocks.items():
            if plans[i].keeps is not None:
                blocks[i], total = block, total + self.cost(i, plans[i])
        for i, plan in zip(blocks, spend(list(blocks.values()), total), strict=True):
            plans[i] = plan
        return self.config.with_plans(plans)

    def options(self, keeps: Sequence[float | None]) -> dict[float | None, list[BlockPlan]]:
        """For each keep (None: dense) the plan of every block, in which what it costs is spent over the block's heads."""
        found: dict[float | None, list[BlockPlan]] = {}
        for keep in keeps:
            found[keep] = list(self.uniform(keep or "dense"))
            for i, block in self.blocks.items() if keep else ():
                found[keep][i] = spend([block], self.cost(i, found[keep][i]))[0]
        return found

    def largest_rank(self) -> int | None:
        """The most that any head may be given; None where nothing is spent."""
        return max((block.settings.ranks[-1] for block in self.blocks.values()), default=None)

    def cost(self, i: int, plan: BlockPlan) -> float:
        """MACs of all heads of block i by a plan that is the same for all of them."""
        block = self.blocks[i]
        return float(block.costs[block.at(plan)]) * self.shape.heads


def spend(blocks: Sequence[BlockErrors], total: float) -> list[BlockPlan]:
    """The plans of least error that cost at most `total` MACs over all heads of `blocks`."""
    if not blocks:
        return []
    settings = max(b.costs.numel() for b in blocks)
    errors = torch.cat([_filled(b.errors.flatten(1), settings) for b in blocks])  # (heads, settings)
    each = torch.cat([_filled(b.costs.flatten().expand(len(b.errors), -1), settings) for b in blocks])
    chosen = choose(errors, each, total).tolist()
    plans = []
    for b in blocks:
        plans.append(b.plan(chosen[: len(b.errors)]))
        chosen = chosen[len(b.errors) :]
    return plans


def _filled(values: Tensor, n: int) -> Tensor:
    """values [H, m], in n columns: further settings that nobody takes."""
    return torch.nn.functional.pad(values, (0, n - values.shape[1]), value=1e30)


def choose(errors: Tensor, costs: Tensor, total: float) -> Tensor:
    """For each item an option, so that the sum of errors is small and that of costs at most `total`: int64 [items].

    errors, costs: [items, options], float64. Bisection of the price, then what is left over goes to the steps that bring the
    most for what they cost. Where even the cheapest options cost more than `total`, these.
    """
    rows = torch.arange(len(errors))

    def at(price: float) -> Tensor:
        return (errors + price * costs).argmin(1)

    def cost(options: Tensor) -> float:
        return float(costs[rows, options].sum())

    low, high = 0.0, float(errors.max() / costs[costs > 0].min()) + 1e-300
    if cost(at(low)) <= total:
        return at(low)
    for _ in range(STEPS):
        middle = (low * high) ** 0.5 if low else high * 1e-12
        low, high = (middle, high) if cost(at(middle)) > total else (low, middle)
    options = at(high) if cost(at(high)) <= total else costs.argmin(1)
    while True:
        gain = errors[rows, options].unsqueeze(1) - errors
        more = costs - costs[rows, options].unsqueeze(1)
        possible = (gain > 0) & (more <= total - cost(options))
        worth = torch.where(possible, gain / more.clamp_min(1e-9), -torch.inf)
        best = int(worth.argmax())
        if not bool(possible.any()):
            return options
        options = options.clone()
        options[best // errors.shape[1]] = best % errors.shape[1]
