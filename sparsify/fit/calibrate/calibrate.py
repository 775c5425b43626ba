"""Dense model and unlabelled images in, sparse model out: no gradient, no label, a few passes over the images.

1. Moments of queries and keys (or Gram matrices of the paper's predictor), summed batch by batch.
2. Closed-form predictors; head-lowrank is folded into `qkv` where that is exact.
3. A fixed sum of ranks is spent over the heads (`ranks.py`), by the first images.
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
from sparsify.fit.calibrate.head_lowrank import Moments
from sparsify.fit.calibrate.ranks import candidates, spend
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
Bases = list[tuple[Tensor, Tensor]]
"""T_q and T_k of each block (`head_lowrank`)."""
Plans = tuple[BlockPlan, ...]


@dataclass(frozen=True)
class Calibration:
    """A calibrated sparse model.

    Attributes:
        model: the model that was given, its attention replaced.
        config: the requested one with cells and ranks resolved.
        images: calibration images read.
    """

    model: nn.Module
    config: SparsityConfig
    images: int


def calibrate(
    model: nn.Module,
    config: SparsityConfig,
    batches: Batches,
    progress: Progress = lambda step, done, total: None,
    execution: Execution = Execution(),
) -> Calibration:
    """Grafts sparse attention into `model` (in place) and fits its predictors.

    Args:
        model: dense, on its device, eval mode.
        config: an integer rank is a mean that is spent unevenly over the heads by head-lowrank with `spread_rank`; a list
            is used as it is.
        execution: how sparse attention is computed in the trials that spend the ranks.

    Raises:
        UnsupportedModel, UsageError: see `graft.graft`; the model is unchanged then.
    """
    plans = graft.plans_of(model, config)
    config = config.with_cells(hosts.num_tokens(model))
    with torch.no_grad():
        if config.predictor == "head-lowrank":
            result = _fit_head_lowrank(model, config, plans, batches, progress, execution)
        else:
            result = _fit_token_lowrank(model, config, plans, batches, progress)
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


def _fit_head_lowrank(
    model: nn.Module, config: SparsityConfig, plans: Plans, batches: Batches, progress: Progress, execution: Execution
) -> Calibration:
    prefix = hosts.num_prefix_tokens(model)
    attentions = hosts.supported_attentions(model)
    moments = [Moments(projection.heads_of(host), projection.head_dim(host)) for host in attentions.values()]
    if all(plan.keep is None for plan in plans):
        graft.graft(model, config)
        return Calibration(model, config, 0)
    images = _counted(batches(), "moments", progress)
    seen = observe(model, images, lambda i, q, k, v: moments[i].add(q, k, prefix))
    bases = [m.basis()[:2] for m in moments]
    if spends_ranks(config):
        probe = torch.cat(list(first_images(batches(), PROBE_IMAGES)))
        images = _counted(probe.split(8), "ranks", progress, len(probe))
        mean_rank = cast(int, config.rank)
        ranks = candidates(mean_rank, hosts.geometry(model, attentions).head_dim)
        errors = _head_errors(model, config, bases, ranks, images, execution)
        distances = _distances(model, config, plans, bases, probe, execution)
        sparse = [i for i, plan in enumerate(plans) if plan.keep is not None]
        config = config.model_copy(update={"rank": spend(errors, distances, ranks, mean_rank, sparse)})
    graft.graft(model, config)
    for (t_q, t_k), module in zip(bases, attention_modules(model).values(), strict=True):
        if isinstance(module, SparseAttention):
            graft.set_basis(module, cast(HeadLowrankPredictor, module.predictor), t_q, t_k)
    return Calibration(model, config, seen)


def _head_errors(
    model: nn.Module,
    config: SparsityConfig,
    bases: Bases,
    ranks: list[int],
    images: Iterable[Tensor],
    execution: Execution,
) -> Tensor:
    """Squared difference of each head's output after `proj` from the dense one at each rank: [depth, H, len(ranks)]."""
    attentions = hosts.supported_attentions(model)
    shape = hosts.geometry(model, attentions)
    plans, heads, head_dim, prefix = config.resolved(shape), shape.heads, shape.head_dim, shape.prefix
    modules, grid = list(attentions.values()), hosts.patch_grid(model)
    error = torch.zeros(shape.depth, heads, len(ranks), dtype=torch.float64)
    biases = [hosts.position_bias(model, host) for host in modules]

    def add(i: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        keep = plans[i].keep
        if keep is None:
            return
        bias, (t_q, t_k) = biases[i], (t.to(q) for t in bases[i])
        dense = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)  # (B, N, H, d)
        q, k = q @ t_q, k @ t_k
        spec = Spec(budget(keep, q.shape[2]), prefix, config.tail, grid, plans[i].cells, (), head_dim**-0.5)
        path = resolve(execution.backend, q, bias)
        w = cast(nn.Linear, modules[i].proj).weight.unflatten(1, (heads, -1))  # (C, H, d)
        gram = torch.einsum("chd,che->hde", w, w)
        for j, r in enumerate(ranks):
            ranking = HeadLowrankPredictor(head_dim, (r,) * heads, True)(q, k, bias, None, spec)
            out = attention.attention(q, k, v, ranking, Context(bias), spec, path, execution.precision)
            difference = out.view_as(dense) - dense
            squares = torch.einsum("bnhd,hde,bnhe->h", difference, gram.to(difference), difference)
            error[i, :, j] += squares.double().cpu()

    observe(model, images, add)
    return error


def _distances(
    model: nn.Module, config: SparsityConfig, plans: Plans, bases: Bases, probe: Tensor, execution: Execution
) -> list[float]:
    """`distance` of the model's output from the dense one when one block alone is sparse; 0 where the plan is dense."""
    twin, dense = graft.dense_twin(model), model(probe)
    distances = [0.0] * len(plans)
    for i, (name, host) in enumerate(hosts.supported_attentions(model).items()):
        if plans[i].keep is not None:
            sparse = graft.sparse_block(model, host, config, plans[i], bases[i])
            sparse.execution = execution
            twin.set_submodule(name, sparse)
            distances[i] = distance(dense, twin(probe), bool(getattr(model, "num_classes", 0)))
            twin.set_submodule(name, host)
    return distances


def _fit_token_lowrank(
    model: nn.Module, config: SparsityConfig, plans: Plans, batches: Batches, progress: Progress
) -> Calibration:
    by_name = hosts.supported_attentions(model)
    _, heads, head_dim, _, prefix = hosts.geometry(model, by_name)
    attentions, grid = list(by_name.values()), hosts.patch_grid(model)
    channels = config.token_lowrank.channels
    moments = [Moments(heads, head_dim) for _ in attentions] if channels else []
    biases = [hosts.position_bias(model, host) for host in attentions]
    if moments:
        observe(model, _counted(batches(), "moments", progress), lambda i, q, k, v: moments[i].add(q, k, prefix))
    predictors = [graft.new_predictor(model, host, config, plan) for host, plan in zip(attentions, plans, strict=True)]
    fits = {i: BasisFit(p, heads) for i, p in enumerate(predictors) if isinstance(p, TokenLowrankPredictor)}
    for i, predictor in ((i, fit.predictor) for i, fit in fits.items()):
        predictor.w_down.copy_(pooling(predictor.rank, prefix, grid))
        if moments:
            t_q, t_k = moments[i].over_heads().basis()[:2]
            assert predictor.w_q is not None and predictor.w_k is not None
            predictor.w_q.copy_(t_q[0, :, :channels].T)
            predictor.w_k.copy_(t_k[0, :, :channels].T)

    def add(i: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if i in fits:
            fits[i].add(q, k, head_dim**-0.5, prefix, biases[i])

    seen = observe(model, _counted(batches(), "attention", progress), add) if fits else 0
    for fit in fits.values():
        fit.solve()
    graft.graft(model, config, predictors)
    return Calibration(model, config, seen)


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
