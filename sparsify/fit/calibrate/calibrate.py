"""Dense model and unlabelled images in, sparse model out: no gradient, no label, a few passes over the images.

1. Moments of queries and keys (or Gram matrices of the paper's predictor), summed batch by batch.
2. Closed-form predictors; head-lowrank is folded into `qkv` where that is exact.
3. Ranks, keeps and cells are spent over the heads (`budgets.py`), by the first images.
4. A fitted importance of tokens, where stages use one (`token_importance.py`).

The same images in the same order give the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from sparsify.config import BlockPlan, SparsityConfig
from sparsify.fit.calibrate import budgets, token_importance
from sparsify.fit.calibrate.budgets import Budgets
from sparsify.fit.calibrate.head_errors import Bases, Trial, measure
from sparsify.fit.calibrate.head_lowrank import Moments
from sparsify.fit.calibrate.token_lowrank import BasisFit, pooling
from sparsify.nn import graft, hosts, projection
from sparsify.nn.attention import Execution, SparseAttention, attention_modules
from sparsify.nn.observe import observe
from sparsify.nn.predictor import HeadLowrankPredictor, TokenLowrankPredictor

PROBE_IMAGES = 24  # images that decide how a budget is spent; fewer large ones (`images_of`)
MANY_TOKENS = 577  # beyond it, fewer images hold as many tokens

Batches = Callable[[], Iterable[Tensor]]
"""Gives the calibration images anew at each call: batches [B, C, H, W], float32, normalised as the model expects."""
Progress = Callable[[str, int, int | None], None]
"""Called with the step's name, the images done in it, and how many there are (None: unknown)."""


@dataclass(frozen=True)
class Calibration:
    """A calibrated sparse model."""

    model: nn.Module  # the model that was given, its attention replaced
    config: SparsityConfig  # the requested one with cells and ranks resolved
    images: int  # calibration images read
    budgets: Budgets  # what other keeps would have


def calibrate(
    model: nn.Module,
    config: SparsityConfig,
    batches: Batches,
    progress: Progress = lambda step, done, total: None,
    execution: Execution = Execution(),
    keeps: Sequence[float] = (),
) -> Calibration:
    """Grafts sparse attention into the dense `model` (in place; on its device, eval mode) and fits its predictors.

    head-lowrank spends what `config.spread` says unevenly over the heads; lists are used as they are. `execution`: how
    sparse attention is computed in the trials for that; `keeps`: others that `Calibration.budgets` will be asked for. Raises
    as `graft.graft`; the model is unchanged then.
    """
    plans, filled = graft.plans_of(model, config), graft.filled(model, config)
    with torch.no_grad():
        asked = config.model_copy(update={"tokens": filled.tokens})
        fit = _Fit(model, asked, filled, plans, batches, progress, execution, keeps)
        result = fit.head_lowrank() if config.predictor == "head-lowrank" else fit.token_lowrank()
        if any(graft.fits_importance(config, len(plans))):
            fit_importance(model, batches, progress)
            graft.set_token_stages(model, result.config)  # removes it again from blocks without a stage
        return result


def fit_importance(model: nn.Module, batches: Batches, progress: Progress = lambda step, done, total: None) -> None:
    """Fits the importance of tokens in every block of a calibrated model, in place (`token_importance.fit`)."""
    count = _Count("importance", progress, len(attention_modules(model)))
    token_importance.fit(model, count.of(batches()), count.block)


@dataclass
class _Fit:
    """The fit of all predictors of a dense model; arguments as of `calibrate`."""

    model: nn.Module
    asked: SparsityConfig
    config: SparsityConfig  # `asked` with its cells
    plans: tuple[BlockPlan, ...]
    batches: Batches
    progress: Progress
    execution: Execution
    keeps: Sequence[float]

    def __post_init__(self) -> None:
        self.attentions, self.grid = hosts.supported_attentions(self.model), hosts.patch_grid(self.model)
        self.shape = hosts.geometry(self.model, self.attentions)
        self.depth, self.heads, self.head_dim, _, self.prefix = self.shape
        self.biases = [hosts.position_bias(self.model, host) for host in self.attentions.values()]

    def head_lowrank(self) -> Calibration:
        model, sparse = self.model, any(plan.keeps is not None for plan in self.plans)
        moments, seen = self._moments() if sparse else ([], 0)
        bases = [m.basis()[:2] for m in moments]
        spent = self._budgets(bases)
        config = spent.model(self.config.keep)
        plans = config.resolved(self.shape)
        hosts_and_plans = zip(self.attentions.values(), plans, strict=True)
        most = spent.largest_rank() if self.keeps else None
        graft.graft(model, config, [graft.new_predictor(model, h, config, p, width=most) for h, p in hosts_and_plans])
        for i, module in enumerate(attention_modules(model).values()):
            if isinstance(module, SparseAttention):
                graft.set_basis(module, cast(HeadLowrankPredictor, module.predictor), *bases[i])
        return Calibration(model, config, seen, spent)

    def token_lowrank(self) -> Calibration:
        model, config, channels = self.model, self.config, self.config.token_lowrank.channels
        moments = self._moments()[0] if channels else []
        pairs = zip(self.attentions.values(), self.plans, strict=True)
        predictors = [graft.new_predictor(model, host, config, plan) for host, plan in pairs]
        fits = {i: BasisFit(p, self.heads) for i, p in enumerate(predictors) if isinstance(p, TokenLowrankPredictor)}
        for i, predictor in ((i, fit.predictor) for i, fit in fits.items()):
            predictor.w_down.copy_(pooling(predictor.rank, self.prefix, self.grid))
            if moments:
                t_q, t_k = moments[i].basis(over_heads=True)[:2]
                assert predictor.w_q is not None and predictor.w_k is not None
                predictor.w_q.copy_(t_q[0, :, :channels].T)
                predictor.w_k.copy_(t_k[0, :, :channels].T)

        def add(i: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            if i in fits:
                fits[i].add(q, k, self.head_dim**-0.5, self.prefix, self.biases[i])
            count.block(i)

        count = _Count("attention", self.progress, self.depth)
        seen = observe(model, count.of(self.batches()), add) if fits else 0
        for fit in fits.values():
            fit.solve()
        graft.graft(model, config, predictors)
        return Calibration(model, config, seen, Budgets(config, self.shape, {}))

    def _budgets(self, bases: Bases) -> Budgets:
        """What keeps cost, by the first of the images if anything is to be spent."""
        spent = Budgets(self.asked, self.shape, {})
        if not bases or not budgets.spends(self.asked):
            return spent
        probe = images_of(PROBE_IMAGES, self.shape.tokens, 8)
        images = torch.cat(list(first_images(self.batches(), probe)))
        plans = [self.plans, *(spent.uniform(keep) for keep in self.keeps)]
        trial = Trial(self.model, self.asked, plans, bases, images, self.execution)
        return replace(spent, blocks=measure(trial, self.progress))

    def _moments(self) -> tuple[list[Moments], int]:
        """The moments of each block, and the images seen."""
        moments = [Moments(self.heads, projection.head_dim(host)) for host in self.attentions.values()]
        count = _Count("moments", self.progress, self.depth)

        def add(i: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            moments[i].add(q, k, self.prefix)
            count.block(i)

        return moments, observe(self.model, count.of(self.batches()), add)


def images_of(n: int, tokens: int, least: int = 32) -> int:
    """How many images of N = `tokens` tokens stand for n of up to `MANY_TOKENS`: as many tokens, at least `least` images."""
    return max(min(n, least), min(n, n * MANY_TOKENS // tokens))


def first_images(batches: Iterable[Tensor], n: int) -> Iterator[Tensor]:
    """The first n images of some batches, in batches."""
    for x in batches:
        yield x[:n]
        n -= len(x[:n])
        if n <= 0:
            return


@dataclass
class _Count:
    """Tells how many images a step has done, after every block of a batch: of large images a batch takes a minute."""

    step: str
    progress: Progress
    depth: int  # blocks
    done: int = 0  # images of whole batches
    size: int = 0  # images of the batch at work

    def of(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches, counted."""
        self.progress(self.step, 0, None)
        for x in batches:
            self.size = len(x)
            yield x
            self.done, self.size = self.done + self.size, 0
            self.progress(self.step, self.done, None)

    def block(self, i: int) -> None:
        """Block i of the batch at work is done, counted from 0."""
        self.progress(self.step, self.done + self.size * (i + 1) // self.depth, None)
