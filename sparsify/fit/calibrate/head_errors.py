"""What every head loses at every setting, measured on a dense model and unlabelled images: what `budgets.py` spends by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify.config import BlockPlan, SparsityConfig
from sparsify.fit.calibrate import budgets
from sparsify.fit.calibrate.budgets import BlockErrors
from sparsify.measure.accuracy import distance
from sparsify.nn import graft, hosts, projection
from sparsify.nn.attention import Execution
from sparsify.nn.observe import observe
from sparsify.nn.predictor import HeadLowrankPredictor
from sparsify.ops.settings import Rows
from sparsify.ops.spec import Spec, budget

ROWS = 48  # query rows of an image by which heads are compared, at most
PAIRS = 48 * 197  # queries times keys of an image for that, at most: fewer rows where there are more tokens
CHUNK = 8  # images at once
WEIGHED = 24 * 256  # tokens by which blocks are weighed, at most (but 4 images): it takes half as many passes as blocks

Progress = Callable[[str, int, int | None], None]
Bases = Sequence[tuple[Tensor, Tensor]]
"""T_q and T_k [H, d, d] of each block (`head_lowrank`)."""


@dataclass
class Trial:
    """A dense model, what it is to become, and the images to try that on.

    `plans`: of each block, for each keep that may be requested; first those of the configuration.
    """

    model: nn.Module
    config: SparsityConfig  # as requested
    plans: Sequence[Sequence[BlockPlan]]
    bases: Bases
    images: Tensor  # [B, C, H, W]
    execution: Execution

    def __post_init__(self) -> None:
        self.hosts = hosts.supported_attentions(self.model)  # by name
        self.shape = hosts.geometry(self.model, self.hosts)
        tile = self.config.tile if self.config.granularity == "tile" else ()
        grid, scale = hosts.patch_grid(self.model), self.shape.head_dim**-0.5
        # the constants of a call; budget and cells are not used
        self.spec = Spec.uniform(1, self.shape.prefix, self.config.tail, grid, (1, 1), tile, scale)


@torch.no_grad()
def measure(trial: Trial, progress: Progress = lambda step, done, total: None) -> Mapping[int, BlockErrors]:
    """Weighted errors of the heads of every block, counted from 0, in which `trial.config` lets something move.

    progress: called with the step, the images done in it, and how many there are, after every block of a batch.
    """
    attentions, found, total = list(trial.hosts.values()), _blocks(trial), len(trial.images)
    depth = len(attentions)
    biases = {i: hosts.position_bias(trial.model, attentions[i]) for i in found}

    def add(i: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if i in found:
            _add(found[i], trial, i, _weights(attentions[i], q), (q, k, v), biases[i])
        progress("budgets", done + len(x) * (i + 1) // depth, total)

    done = 0
    progress("budgets", 0, total)
    for x in trial.images.split(CHUNK) if found else ():
        observe(trial.model, [x], add)
        done += len(x)
    some = trial.images[: max(4, WEIGHED // trial.shape.tokens)]
    distances, weighted = _distances(trial, some, list(found), progress), {}
    for i, block in found.items():
        at = block.at(trial.plans[0][i])
        weight = max(0.0, distances[i]) / max(float(block.errors[(slice(None), *at)].sum()), 1e-30)
        weighted[i] = BlockErrors(block.settings, block.errors * weight, block.costs).ordered()
    return weighted


def _blocks(trial: Trial) -> dict[int, BlockErrors]:
    """Errors of zero for every block in which something moves."""
    shape, found = trial.shape, {}
    for i, host in enumerate(trial.hosts.values()):
        settings = budgets.settings(trial.config, [plans[i] for plans in trial.plans], shape.tokens, shape.head_dim)
        if settings is not None:
            folded = trial.config.fold and projection.foldable(host, hosts.rotary(trial.model))
            costs = budgets.costs(settings, shape.tokens, shape.head_dim, folded, trial.spec)
            found[i] = BlockErrors(settings, torch.zeros(shape.heads, *settings.shape, dtype=torch.float64), costs)
    return found


def _weights(host: nn.Module, q: Tensor) -> Tensor:
    """R [H, d, d] with R R' = W'W, W the columns of `proj` for a head: |R' x| is the size of x [d] after `proj`."""
    H, d = q.shape[1], q.shape[3]
    w = cast(nn.Linear, cast(Any, host).proj).weight.unflatten(1, (H, d)).double()  # (C, H, d)
    gram = torch.einsum("chd,che->hde", w, w)
    gram += 1e-9 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(d, device=w.device)  # of full rank
    return torch.linalg.cholesky(gram).float()


def _add(
    block: BlockErrors, trial: Trial, i: int, root: Tensor, qkv: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
) -> None:
    """Adds the squared difference of each head's output after `proj` from the dense one, at each setting, over some rows.

    i: of the block; root: see `_weights`; qkv: [B, H, N, d] each; bias: of the logits.
    """
    q, k, v = (x.float() for x in qkv)
    (_, H, N, d), P = q.shape, trial.shape.prefix
    t_q, t_k = (t.to(q) for t in trial.bases[i])
    q, k, v = q @ t_q, k @ t_k, v @ root
    some = torch.randperm(N - P, generator=torch.Generator().manual_seed(i))[: max(16, min(ROWS, PAIRS // N))]
    rows = Rows(q, k, v, bias, some.sort().values.to(q.device) + P, trial.spec)
    counts = [budget(keep, N) for keep in block.settings.keeps]
    for j, r in enumerate(block.settings.ranks):
        ranking = HeadLowrankPredictor(d, (r,) * H, True)(q, k, None, None, trial.spec).written(q, k)
        for m, out in enumerate(rows.outputs(ranking, counts, block.settings.cells)):
            squares = (out - rows.dense.unsqueeze(3)).square().sum((0, 2, 4))  # (H, K)
            block.errors[:, j, :, m] += squares.double().cpu()


class _Skip(nn.Module):
    """Stands for a block whose output is known already."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def _distances(trial: Trial, images: Tensor, blocks: Sequence[int], progress: Progress) -> dict[int, float]:
    """`distance` of the model's output from the dense one when one of `blocks` alone is sparse, all its heads alike.

    images: those of the trial, or fewer: weights of blocks that are off by half hardly change what the model loses.
    """
    model, names = trial.model, list(trial.hosts)
    classes, sums = bool(getattr(model, "num_classes", 0)), dict.fromkeys(blocks, 0.0)
    sparse = {}
    for i, host in enumerate(trial.hosts.values()):
        if i in sums:
            sparse[i] = graft.sparse_block(model, host, trial.config, trial.plans[0][i], trial.bases[i])
            sparse[i].execution = trial.execution
    done = 0
    progress("blocks", 0, len(images))
    for x in images.split(CHUNK) if blocks else ():
        twin = graft.dense_twin(model)
        stack = cast(Any, twin).blocks
        dense, entering = _inputs(twin, stack, x)
        for i in range(len(stack)):
            if i in sparse:
                host = twin.get_submodule(names[i])
                twin.set_submodule(names[i], sparse[i])
                with_input = stack[i].register_forward_pre_hook(partial(_enter, entering[i]))
                sums[i] += len(x) * distance(dense, _output(twin, x), classes)
                with_input.remove()
                twin.set_submodule(names[i], host)
            stack[i] = _Skip()
            progress("blocks", done + len(x) * (i + 1) // len(stack), len(images))
        done += len(x)
    return {i: total / len(images) for i, total in sums.items()}


def _inputs(model: nn.Module, blocks: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output of `model` for x, and what enters each of its blocks."""
    entering: list[Tensor] = []
    watched = [block.register_forward_pre_hook(lambda _, args: entering.append(args[0])) for block in blocks]
    try:
        return _output(model, x), entering
    finally:
        for handle in watched:
            handle.remove()


def _output(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, or for models without a classifier all tokens: nobody knows which of them will be read."""
    return model(x) if getattr(model, "num_classes", 0) else cast(Any, model).forward_features(x)


def _enter(x: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: the block's input is x."""
    return (x, *args[1:])
