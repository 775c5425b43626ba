"""Chooses token keep and keep of every block for a target: a fraction of the dense model's MACs or time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn

from sparsify.config import BlockPlan, SparsityConfig, Tokens
from sparsify.errors import UsageError, field
from sparsify.fit.calibrate.budgets import spend
from sparsify.fit.schedule.costs import ROUNDS, BlockCost, Keep, MacsCost, Options, macs_costs, measured_costs
from sparsify.fit.schedule.search import BlockSchedule, price, search
from sparsify.fit.schedule.sensitivity import Sensitivity, measure
from sparsify.measure.latency import interleaved
from sparsify.measure.macs import count, image_shape, replica
from sparsify.nn import graft, hosts, schedules
from sparsify.nn.attention import attention_modules

KEEPS: tuple[Keep, ...] = (None, 0.4, 0.25, 0.1, 0.03)  # that a search tries
TRIES = 4  # searches for a latency
TOLERANCE = 0.03  # fraction of a latency target by which the measured time may miss it


@dataclass(frozen=True)
class FoundSchedule:
    """A schedule for a target."""

    config: SparsityConfig  # the sparse model's, `keep` and `tokens` one value for each block
    schedule: BlockSchedule  # the result of the search, with the damage it predicts
    share: float  # of the dense cost: MACs as the search counts them, or time as measured


def options_of(model: nn.Module, config: SparsityConfig, keeps: Sequence[Keep] = KEEPS) -> Options:
    """Keeps to try in a grafted model, the same in all heads of a block, with ranks and cells as `config` has them."""
    shape = hosts.geometry(model, attention_modules(model))
    return {keep: config.model_copy(update={"keep": keep or "dense"}).resolved(shape) for keep in keeps}


def sensitivity(
    model: nn.Module,
    config: SparsityConfig,
    images: Iterable[Tensor],
    options: Options,
    progress: Callable[[int], None] = lambda done: None,
) -> Sensitivity:
    """`measure` for a grafted model and its configuration."""
    return measure(model, _way(config), options, images, progress).smoothed()


def dense_macs(model: nn.Module) -> int:
    """MACs of the dense original of a grafted model, for an image of its own size."""
    device = next(model.parameters()).device
    return count(graft.dense_twin(replica(model, device)), image_shape(model), []).total


def for_macs(
    model: nn.Module, config: SparsityConfig, measured: Sensitivity, target: float, dense: int, overhead: float = 0.0
) -> FoundSchedule:
    """The schedule of least damage by which the model takes `target` of `dense` MACs an image; `UsageError` for none.

    overhead: of a round that removes tokens, as a fraction of `dense`: see `sparsify.config.Target`.
    """
    costs = macs_costs(model, _way(config), measured.options)
    aim = target * dense - (fixed := dense - _dense_price(costs, measured.patches))
    schedule, plans = together(measured, costs, search(measured, costs, aim, overhead * dense), aim)
    share = (schedule.cost + fixed) / dense
    if share > 1.02 * target:
        least = f"the least that a schedule of this model reaches is {share:.3f}"
        raise UsageError(f"{field('target_macs')} {target:g}: {least}")
    return FoundSchedule(scheduled(config, schedule, plans), schedule, share)


def for_latency(
    model: nn.Module,
    config: SparsityConfig,
    measured: Sensitivity,
    target: float,
    batch: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> FoundSchedule:
    """The schedule of least damage whose forward pass takes `target` of the dense one's time on this machine.

    The parts of a block are timed at a few numbers of tokens. The schedule that the search finds by these is timed as a
    whole, in turns with the dense model, and the search is repeated up to `TRIES` times for a target corrected by what the
    measured time missed. The result is the schedule that came closest. Raises `UsageError` where none is that fast.
    """
    costs = measured_costs(model, _way(config), measured.options, batch)
    dense = graft.dense_twin(model)
    images = torch.randn(batch, *image_shape(model), generator=torch.Generator().manual_seed(0))
    images = images.to(next(model.parameters()))
    timed = partial(interleaved, rounds=ROUNDS, device=images.device)
    whole = timed({"dense": partial(dense, images)})["dense"].median / batch
    fixed = max(0.0, whole - _dense_price(costs, measured.patches))
    aim, best = target, None
    for _ in range(TRIES):
        schedule = search(measured, costs, aim * whole - fixed)
        found = scheduled(config, schedule, _plans(measured.options, schedule))
        sparse = schedules.applied(model, found)
        times = timed({"dense": partial(dense, images), "sparse": partial(sparse, images)})
        share = times["sparse"].median / times["dense"].median
        say(f"latency: {share:.3f} of dense measured, target {target:g}")
        if best is None or abs(share - target) < abs(best.share - target):
            best = FoundSchedule(found, schedule, share)
        if abs(share - target) <= TOLERANCE * target:
            break
        aim *= target / share
    assert best is not None
    if best.share > 1.1 * target:
        least = f"the least measured for this model and machine is {best.share:.2f}"
        raise UsageError(f"{field('target_latency')} {target:g}: {least}")
    return best


def together(
    measured: Sensitivity, costs: Sequence[MacsCost], schedule: BlockSchedule, target: float
) -> tuple[BlockSchedule, list[BlockPlan]]:
    """The schedule and its plans, once the heads of all sparse blocks share what these have and what `target` leaves over.

    A head costs what it does with the tokens that its block has. Keeps of these blocks become means over their heads.
    """
    plans, blocks, total = _plans(measured.options, schedule), {}, max(0.0, target - schedule.cost)
    for i, (n, keep) in enumerate(zip(schedule.counts, schedule.keeps, strict=False)):
        block = measured.budgets.blocks.get(i) if measured.budgets else None
        if block is not None and keep is not None and plans[i].keeps is not None:
            blocks[i], total = (
                replace(block, costs=costs[i].heads(block.settings, n)),
                total + costs[i].attention(keep, n),
            )
    if not blocks:
        return schedule, plans
    keeps, cost = list(schedule.keeps), schedule.cost
    for (i, block), plan in zip(blocks.items(), spend(list(blocks.values()), total), strict=True):
        cost += block.cost(plan) - costs[i].attention(keeps[i], schedule.counts[i])
        keeps[i] = round(fmean(plan.keeps or ()), 3)
        plans[i] = plan
    return replace(schedule, keeps=tuple(keeps), cost=cost), plans


def _plans(options: Options, schedule: BlockSchedule) -> list[BlockPlan]:
    """The plan of each block by a schedule's keeps."""
    return [options[keep][i] for i, keep in enumerate(schedule.keeps)]


def scheduled(config: SparsityConfig, schedule: BlockSchedule, plans: Sequence[BlockPlan]) -> SparsityConfig:
    """`config` with plans of its blocks and the token rates of a schedule."""
    tokens = None
    if len(set(schedule.counts)) > 1:
        tokens = (config.tokens or Tokens()).model_dump() | {"keep": schedule.rates()}
    config = config.with_plans(plans)
    return SparsityConfig.model_validate(config.model_dump() | {"tokens": tokens})


def _way(config: SparsityConfig) -> str:
    """How tokens are removed."""
    return (config.tokens or Tokens()).way


def _dense_price(costs: Sequence[BlockCost], patches: int) -> float:
    """Cost of all blocks with dense attention and all patch tokens."""
    return price(costs, [patches] * (len(costs) + 1), [None] * len(costs))
