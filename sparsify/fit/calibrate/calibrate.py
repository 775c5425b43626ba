"""Dense model and unlabelled images in, sparse model out: no gradient, no label, a few passes over the images.

1. Moments of queries and keys (or Gram matrices of the paper's predictor), summed batch by batch.
2. Closed-form predictors; head-lowrank is folded into `qkv` where that is exact.
3. A fixed sum of ranks is spent over the heads (`head_lowrank.py`), by the first images.
4. A fitted importance of tokens, where stages use one (`token_importance.py`).

The same images in the same order give the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sparsify.config import BlockPlan, SparsityConfig
from sparsify.fit.calibrate import token_importance
from sparsify.fit.calibrate.head_lowrank import Moments, candidates, spend
from sparsify.fit.calibrate.token_lowrank import BasisFit, pooling
from sparsify.measure.accuracy import distance
from sparsify.nn import graft, hosts, projection
from sparsify.nn.attention import Execution, SparseAttention, attention_modules
from sparsify.nn.observe import observe
from sparsify.nn.predictor import HeadLowrankPredictor, TokenLowrankPredictor
from sparsify.ops import attention
from sparsify.ops.backends import resolve
from sparsify.ops.selection import Context
from sparsify.ops.spec import Spec, budget

PROBE_IMAGES = 24  # images that decide the ranks: enough to order the blocks, seconds on two cores

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


def calibrate(
    model: nn.Module,
    config: SparsityConfig,
    batches: Batches,
    progress: Progress = lambda step, done, total: None,
    execution: Execution = Execution(),
) -> Calibration:
    """Grafts sparse attention into the dense `model` (in place; on its device, eval mode) and fits its predictors.

    An integer rank is a mean that is spent unevenly over the heads by head-lowrank with `spread_rank`; a list is used as it
    is. `execution`: how sparse attention is computed in the trials that spend the ranks. Raises as `graft.graft`; the model
    is unchanged then.
    """
    plans = graft.plans_of(model, config)
    with torch.no_grad():
        fit = _Fit(model, graft.filled(model, config), plans, batches, progress, execution)
        result = fit.head_lowrank() if config.predictor == "head-lowrank" else fit.token_lowrank()
        if any(graft.fits_importance(config, len(plans))):
            fit_importance(model, batches, progress)
            graft.set_token_stages(model, result.config)  # removes it again from blocks without a stage
        return result


def fit_importance(model: nn.Module, batches: Batches, progress: Progress = lambda step, done, total: None) -> None:
    """Fits the importance of tokens in every block of a calibrated model, in place (`token_importance.fit`)."""
    token_importance.fit(model, _counted(batches(), "importance", progress))


def spends_ranks(config: SparsityConfig) -> bool:
    """Whether a calibration spends the ranks over the heads, and for that tries sparse attention at several ranks."""
    return config.predictor == "head-lowrank" and isinstance(config.rank, int) and config.spread_rank


@dataclass
class _Fit:
    """The fit of all predictors of a dense model; arguments as of `calibrate`, the cells of `config` resolved."""

    model: nn.Module
    config: SparsityConfig
    plans: tuple[BlockPlan, ...]
    batches: Batches
    progress: Progress
    execution: Execution

    def __post_init__(self) -> None:
        self.attentions, self.grid = hosts.supported_attentions(self.model), hosts.patch_grid(self.model)
        self.depth, self.heads, self.head_dim, _, self.prefix = hosts.geometry(self.model, self.attentions)
        self.biases = [hosts.position_bias(self.model, host) for host in self.attentions.values()]

    def head_lowrank(self) -> Calibration:
        model, config = self.model, self.config
        sparse = [i for i, plan in enumerate(self.plans) if plan.keep is not None]
        if not sparse:
            graft.graft(model, config)
            return Calibration(model, config, 0)
        moments, seen = self._moments()
        bases = [m.basis()[:2] for m in moments]
        if spends_ranks(config):
            probe = torch.cat(list(first_images(self.batches(), PROBE_IMAGES)))
            mean_rank = cast(int, config.rank)
            ranks = candidates(mean_rank, self.head_dim)
            errors, distances = self._head_errors(bases, ranks, probe), self._distances(bases, probe)
            config = config.model_copy(update={"rank": spend(errors, distances, ranks, mean_rank, sparse)})
        graft.graft(model, config)
        for (t_q, t_k), module in zip(bases, attention_modules(model).values(), strict=True):
            if isinstance(module, SparseAttention):
                graft.set_basis(module, cast(HeadLowrankPredictor, module.predictor), t_q, t_k)
        return Calibration(model, config, seen)

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

        seen = observe(model, _counted(self.batches(), "attention", self.progress), add) if fits else 0
        for fit in fits.values():
            fit.solve()
        graft.graft(model, config, predictors)
        return Calibration(model, config, seen)

    def _moments(self) -> tuple[list[Moments], int]:
        """The moments of each block, and the images seen."""
        moments = [Moments(self.heads, projection.head_dim(host)) for host in self.attentions.values()]
        images = _counted(self.batches(), "moments", self.progress)
        return moments, observe(self.model, images, lambda i, q, k, v: moments[i].add(q, k, self.prefix))

    def _head_errors(self, bases: list[tuple[Tensor, Tensor]], ranks: list[int], probe: Tensor) -> Tensor:
        """Squared difference of each head's output after `proj` from the dense one at each rank: [depth, H, len(ranks)].

        bases: T_q and T_k of each block (`head_lowrank`); probe: images.
        """
        attentions = list(self.attentions.values())
        error = torch.zeros(self.depth, self.heads, len(ranks), dtype=torch.float64)

        def add(i: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            keep = self.plans[i].keep
            if keep is None:
                return
            bias, (t_q, t_k) = self.biases[i], (t.to(q) for t in bases[i])
            dense = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)  # (B, N, H, d)
            q, k = q @ t_q, k @ t_k
            b, scale = budget(keep, q.shape[2]), self.head_dim**-0.5
            spec = Spec(b, self.prefix, self.config.tail, self.grid, self.plans[i].cells, (), scale)
            path = resolve(self.execution.backend, q, bias)
            w = cast(nn.Linear, attentions[i].proj).weight.unflatten(1, (self.heads, -1))  # (C, H, d)
            gram = torch.einsum("chd,che->hde", w, w)
            for j, r in enumerate(ranks):
                ranking = HeadLowrankPredictor(self.head_dim, (r,) * self.heads, True)(q, k, bias, None, spec)
                out = attention.attention(q, k, v, ranking, Context(bias), spec, path, self.execution.precision)
                difference = out.view_as(dense) - dense
                squares = torch.einsum("bnhd,hde,bnhe->h", difference, gram.to(difference), difference)
                error[i, :, j] += squares.double().cpu()

        observe(self.model, _counted(probe.split(8), "ranks", self.progress, len(probe)), add)
        return error

    def _distances(self, bases: list[tuple[Tensor, Tensor]], probe: Tensor) -> list[float]:
        """`distance` of the model's output from the dense one when one block alone is sparse; 0 where the plan is dense."""
        twin, dense = graft.dense_twin(self.model), self.model(probe)
        distances = [0.0] * self.depth
        for i, (name, host) in enumerate(self.attentions.items()):
            if self.plans[i].keep is not None:
                sparse = graft.sparse_block(self.model, host, self.config, self.plans[i], bases[i])
                sparse.execution = self.execution
                twin.set_submodule(name, sparse)
                distances[i] = distance(dense, twin(probe), bool(getattr(self.model, "num_classes", 0)))
                twin.set_submodule(name, host)
        return distances


def first_images(batches: Iterable[Tensor], n: int) -> Iterator[Tensor]:
    """The first n images of some batches, in batches."""
    for x in batches:
        yield x[:n]
        n -= len(x[:n])
        if n <= 0:
            return


def _counted(batches: Iterable[Tensor], step: str, progress: Progress, total: int | None = None) -> Iterator[Tensor]:
    """The batches; `progress` is called with the images done."""
    done = 0
    progress(step, 0, total)
    for x in batches:
        yield x
        done += len(x)
        progress(step, done, total)
