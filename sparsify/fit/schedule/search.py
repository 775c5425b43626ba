"""The number of tokens after each block and the keep of each block, with the least damage for a given cost.

Damage adds up: errors of different blocks are nearly independent, and KL divergence is quadratic in small errors. With
D_i(m) the damage of a stage after block i alone that leaves m tokens, and K_i(a) that of keep a in block i alone,

    damage(n_0 >= n_1 >= .. >= n_L, a) = sum_i  D_i(n_i) - D_i(n_{i-1})  +  K_i(a_i)

where a stage pays only for the tokens that are still present. For a given price of a unit of cost, dynamic programming over
the blocks finds the best schedule exactly. Bisection finds the price that meets the target, and between the schedules of two
neighbouring prices the counts are interpolated.

A round that removes tokens takes time that its MACs do not tell: many small operators. `overhead`, in the unit of the costs,
is added to each round where schedules are compared, and not where the target is met: the result has fewer, larger rounds and
the same cost. Leaving prefix rows alone selects nothing and has no round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sparsify.fit.schedule.costs import BlockCost, Keep
from sparsify.fit.schedule.sensitivity import Sensitivity

LEVELS = 64  # different numbers of tokens in the search
STEPS = 50  # of each bisection


@dataclass(frozen=True)
class BlockSchedule:
    """A schedule, its cost and its damage."""

    counts: tuple[int, ...]  # patch tokens before the first block, and after each block
    keeps: tuple[Keep, ...]  # of each block; None: dense
    cost: float  # of all blocks, in the unit of the costs
    damage: float  # predicted, in the unit of `Sensitivity`

    def rates(self) -> tuple[float, ...]:
        """Token rate of each block, rounded down so that `sparsify.config.Tokens` gives these counts."""
        return tuple(1.0 if m == n else int(m / n * 1e5) / 1e5 for n, m in pairwise(self.counts))


def search(sensitivity: Sensitivity, costs: Sequence[BlockCost], target: float, overhead: float = 0.0) -> BlockSchedule:
    """The schedule of least damage whose blocks cost at most `target` and come close to it; else the cheapest."""
    solve = _solver(sensitivity, costs, overhead)
    if solve(0.0).cost <= target:
        return solve(0.0)
    low, high = 0.0, 1e-12
    while solve(high).cost > target and high < 1e12:
        low, high = high, high * 10
    for _ in range(STEPS):
        middle = (low * high) ** 0.5 if low else high / 10
        low, high = (middle, high) if solve(middle).cost > target else (low, middle)
        if low and high / low < 1.0001:
            break
    return _between(sensitivity, costs, solve(high), solve(low), target, fixed_rounds=overhead > 0)


def price(costs: Sequence[BlockCost], counts: Sequence[int], keeps: Sequence[Keep]) -> float:
    """Cost of all blocks; `counts` as in `BlockSchedule`."""
    return sum(c.whole(a, n, m) for c, a, (n, m) in zip(costs, keeps, pairwise(counts), strict=True))


def _solver(
    sensitivity: Sensitivity, costs: Sequence[BlockCost], overhead: float = 0.0
) -> Callable[[float], BlockSchedule]:
    """A function: price of a unit of cost -> the best schedule with counts among `LEVELS` levels."""
    n0, depth = sensitivity.patches, len(costs)
    least = max(1, int(np.ceil(sensitivity.shares[-1] * n0)))
    levels = np.unique(np.ceil(np.linspace(least, n0, LEVELS)).astype(int))[::-1]  # descending, n0 first
    if sensitivity.empty is not None:
        levels = np.append(levels, 0)
    L = len(levels)
    damage = np.stack([sensitivity.of_tokens(i, levels) for i in range(depth)])  # (depth, L)
    step = np.maximum(damage[:, None, :] - damage[:, :, None], 0)  # (depth, L in, L out)
    allowed = np.triu(np.ones((L, L), bool))  # tokens do not come back
    options = list(sensitivity.options)
    attention = np.array([[[c.attention(a, n) if n else 0.0 for n in levels] for a in options] for c in costs])
    keep_damage = np.array([[sensitivity.of_keep(i, a) for a in options] for i in range(depth)])  # (depth, options)
    rest = np.array(
        [[[_rest(c, n, m, overhead) for m in levels] for n in levels] for c in costs]
    )  # (depth, L in, L out)

    def solve(price_: float) -> BlockSchedule:
        best, back = np.full(L, np.inf), []
        best[0] = 0.0
        chosen = (price_ * attention + keep_damage[:, :, None]).argmin(1)  # (depth, L)
        for i in range(depth):
            attending = (price_ * attention[i] + keep_damage[i][:, None]).min(0)  # (L)
            total = best[:, None] + step[i] + price_ * rest[i] + attending[:, None]
            if levels[-1] == 0:
                total[:, -1] -= attending  # only prefix rows: dense attention, counted in `rest`
                total[-1, :] = np.inf
                if i < depth - 1:
                    total[:, -1] = np.inf
            total = np.where(allowed, total, np.inf)
            back.append(total.argmin(0))
            best = total.min(0)
        path = [int(best.argmin())]
        for i in range(depth - 1, -1, -1):
            path.append(int(back[i][path[-1]]))
        path.reverse()
        counts = tuple(int(levels[j]) for j in path)
        keeps = tuple(options[chosen[i][path[i]]] if counts[i + 1] else None for i in range(depth))
        return _schedule(sensitivity, costs, counts, keeps)

    return solve


def _rest(cost: BlockCost, n: int, m: int, overhead: float) -> float:
    """All parts of a block but its attention, with the overhead of its rounds."""
    if n == 0 or m > n:
        return 0.0
    if m == 0:
        return cost.whole(None, n, m)
    return cost.whole(None, n, m) - cost.attention(None, n) + overhead * cost.rounds(n, m)


def _between(
    sensitivity: Sensitivity,
    costs: Sequence[BlockCost],
    cheap: BlockSchedule,
    dear: BlockSchedule,
    target: float,
    fixed_rounds: bool,
) -> BlockSchedule:
    """Interpolates from the schedule below the target towards the one above it, as far as the target allows.

    fixed_rounds: the result has no rounds that `cheap` has not.
    """
    best = cheap
    for keeps in (cheap.keeps, dear.keeps):
        low, high = 0.0, 1.0
        for _ in range(20):
            t = (low + high) / 2
            blend = [round(a + t * (b - a)) for a, b in zip(cheap.counts, dear.counts, strict=True)]
            for i in range(1, len(blend) if fixed_rounds else 0):
                if cheap.counts[i] == cheap.counts[i - 1]:
                    blend[i] = blend[i - 1]
            if cheap.counts[-1] == 0:
                blend[-1] = 0
            found = _schedule(sensitivity, costs, tuple(blend), keeps)
            if found.cost > target:
                high = t
                continue
            low, best = t, max(best, found, key=lambda schedule: (schedule.cost, -schedule.damage))
    return best


def _schedule(
    sensitivity: Sensitivity, costs: Sequence[BlockCost], counts: tuple[int, ...], keeps: tuple[Keep, ...]
) -> BlockSchedule:
    damage = sum(max(0.0, sensitivity.of_keep(i, a)) for i, a in enumerate(keeps))
    for i in range(len(keeps)):
        before, after = sensitivity.of_tokens(i, np.array(counts[i : i + 2]))
        damage += max(0.0, float(after - before))
    return BlockSchedule(counts, keeps, price(costs, counts, keeps), float(damage))
