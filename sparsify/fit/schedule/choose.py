"""Chooses which tokens leave where and which keys are kept, for a target: a share of the dense model's MACs or time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparsify.config import SparsityConfig, Tokens
from sparsify.errors import UsageError
from sparsify.fit.schedule import costs as costing
from sparsify.fit.schedule import search as searching
from sparsify.fit.schedule import seconds
from sparsify.fit.schedule.costs import Keep, Options
from sparsify.fit.schedule.search import BlockSchedule
from sparsify.fit.schedule.sensitivity import Sensitivity, measure
from sparsify.measure.latency import interleaved
from sparsify.measure.macs import count, image_shape, replica
from sparsify.nn import graft, hosts

KEEPS: tuple[Keep, ...] = (None, 0.25, 0.1, 0.05)  # that a search tries
ROUNDS = 9  # of every timing
TRIES = 4
NEAR = 0.03  # of the target: near enough


@dataclass(frozen=True)
class FoundSchedule:
    """A schedule for a target.

    Attributes:
        config: the sparse model's, `keep` and `tokens` one value for each block.
        schedule: what the search found, with the damage it predicts.
        share: of the dense cost: MACs as the search counts them, or time as measured.
        sensitivity: what it went by.
    """

    config: SparsityConfig
    schedule: BlockSchedule
    share: float
    sensitivity: Sensitivity


def options_of(config: SparsityConfig, tokens: int, keeps: Sequence[Keep] = KEEPS) -> Options:
    """Keeps to try for N = `tokens`, each with the grid of cells that `config` gives it."""
    sparse = {keep: config.model_copy(update={"keep": keep}).with_cells(tokens).cells_of(0) for keep in keeps if keep}
    return {keep: sparse[keep] if keep else (1, 1) for keep in keeps}


def sensitivity(
    model: nn.Module, config: SparsityConfig, images: Iterable[Tensor], keeps: Sequence[Keep] = KEEPS,
    progress: Callable[[int], None] = lambda done: None,
) -> Sensitivity:  # fmt: skip
    """`measure` for a grafted model and its configuration."""
    options = options_of(config, hosts.num_tokens(model), keeps)
    return measure(model, way_of(config), options, images, progress).smoothed()


def dense_macs(model: nn.Module) -> int:
    """MACs of the dense original of a grafted model, for an image of its own size."""
    device = next(model.parameters()).device
    return count(graft.dense_twin(replica(model, device)), image_shape(model), []).total


def for_macs(
    model: nn.Module, config: SparsityConfig, measured: Sensitivity, target: float, dense: int
) -> FoundSchedule:
    """The schedule of least damage whose whole model takes `target` of `dense` MACs (`dense_macs`) for an image.

    Raises:
        UsageError: no schedule is that cheap.
    """
    prefix, n0 = hosts.num_prefix_tokens(model), measured.patches
    options = options_of(config, n0 + prefix, measured.options)
    found = costing.macs(model, prefix, hosts.ranking_rows(model), way_of(config), options)
    fixed = dense - searching.price(found, [n0] * (len(found) + 1), [None] * len(found))
    schedule = searching.search(measured, found, target * dense - fixed)
    share = (schedule.cost + fixed) / dense
    if share > 1.02 * target:
        raise UsageError(f"--target-macs {target:g}: the least that a schedule of this model reaches is {share:.3f}")
    return FoundSchedule(config_of(config, schedule), schedule, share, measured)


def for_latency(
    model: nn.Module, config: SparsityConfig, measured: Sensitivity, target: float, batch: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> FoundSchedule:  # fmt: skip
    """The schedule of least damage whose forward pass takes `target` of the dense one's time on this machine.

    Parts of a block are timed at a few numbers of tokens; what the search makes of them is then timed as a whole, in turns
    with the dense model, and the search aims again by what it missed, `TRIES` times. `share` is the last measured one.

    Raises:
        UsageError: no schedule is that fast.
    """
    prefix, n0 = hosts.num_prefix_tokens(model), measured.patches
    options = options_of(config, n0 + prefix, measured.options)
    found = seconds.measured(model, way_of(config), options, batch)
    dense = graft.dense_twin(model)
    images = torch.randn(batch, *image_shape(model), generator=torch.Generator().manual_seed(0)).to(
        next(model.parameters())
    )
    whole = interleaved({"dense": partial(dense, images)}, rounds=ROUNDS)["dense"].median / batch
    fixed = max(0.0, whole - searching.price(found, [n0] * (len(found) + 1), [None] * len(found)))
    aim, best = target, None
    for _ in range(TRIES):
        schedule = searching.search(measured, found, aim * whole - fixed)
        trial = graft.applied(model, config_of(config, schedule))
        times = interleaved({"dense": partial(dense, images), "sparse": partial(trial, images)}, rounds=ROUNDS)
        share = times["sparse"].median / times["dense"].median
        say(f"latency: {share:.3f} of dense measured, {target:g} wanted")
        if best is None or abs(share - target) < abs(best.share - target):
            best = FoundSchedule(config_of(config, schedule), schedule, share, measured)
        if abs(share - target) <= NEAR * target:
            break
        aim *= target / share
    assert best is not None
    if best.share > 1.1 * target:
        raise UsageError(
            f"--target-latency {target:g}: the least measured for this model and machine is {best.share:.2f}"
        )
    return best


def config_of(config: SparsityConfig, schedule: BlockSchedule) -> SparsityConfig:
    """`config` with the keeps and token rates of a schedule."""
    tokens = None
    if len(set(schedule.counts)) > 1:
        tokens = (config.tokens or Tokens()).model_copy(update={"keep": schedule.rates()})
    keeps = tuple("dense" if keep is None else keep for keep in schedule.keeps)
    return SparsityConfig.model_validate(
        config.model_dump() | {"keep": keeps, "tokens": tokens and tokens.model_dump()}
    )


def way_of(config: SparsityConfig) -> str:
    """The way that tokens leave."""
    return (config.tokens or Tokens()).way
