"""How much the model's output changes when tokens are removed after one block alone, or one block alone keeps fewer keys.

Measured once, on unlabelled images: each trial starts from the dense model's input of its block, so that all trials of all
blocks cost about as much as forty passes through the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.fit.calibrate.budgets import Budgets
from sparsify.fit.schedule.costs import Keep, Options
from sparsify.measure.accuracy import distance
from sparsify.nn import graft, token_models
from sparsify.nn.attention import DenseAttention, GraftedAttention, SparseAttention
from sparsify.nn.tokens import TokenStage, TokenState

SHARES = (0.85, 0.7, 0.5, 0.35, 0.2, 0.1)  # of the patch tokens, tried after each block
CHUNK = 16  # maximum images per forward pass
FLOOR = 1e-5  # damage that cannot be told from zero
Progress = Callable[[int], None]
"""Called with the images done."""
State = tuple[Tensor, TokenState]


@dataclass(frozen=True)
class Sensitivity:
    """Damage to the output by block: `distance` from the dense model's output, mean over images."""

    patches: int  # n0
    shares: tuple[float, ...]  # of the patch tokens, descending, 1 first
    tokens: np.ndarray  # [depth, len(shares)], damage of a stage after the block
    empty: float | None  # damage of keeping only prefix tokens after the last block; None where the head reads patches
    options: Options  # what a block may have; None: dense
    keeps: np.ndarray  # [depth, len(options)], damage of a keep in the block
    budgets: Budgets | None = None  # what the options were spent from, in MACs; None: nothing moves between heads

    def of_tokens(self, block: int, counts: np.ndarray) -> np.ndarray:
        """Damage of a stage after a block by the patch tokens that it keeps; its root is interpolated linearly.

        Below the lowest share it is that of the lowest share; 0 is for the last block (`empty`).
        """
        known = np.maximum.accumulate(self.tokens[block].clip(0))  # fewer tokens never count as better
        damage = np.interp(-np.asarray(counts) / self.patches, [-s for s in self.shares], np.sqrt(known)) ** 2
        return np.where(np.asarray(counts) == 0, max(0.0, self.empty or 0.0), damage)

    def smoothed(self) -> Sensitivity:
        """A copy with less noise in `tokens`: the geometric mean of the measured damage D and of a least-squares fit,

        log D_i(s) = a_0 + a_1 t + a_2 t^2 + a_3 t^3 + b_1 x + b_2 x^2 + c t x,    t = i / depth, x = log(-log s)

        The damage of a schedule is made of differences between neighbouring blocks; with 20 % noise in them it would remove
        too many tokens at once. Blocks after which tokens do not matter (the last) are not changed.
        """
        rows = np.flatnonzero(self.tokens.max(1) > FLOOR)
        if len(rows) < 4:
            return self
        log = np.log(np.maximum(self.tokens[rows, 1:], FLOOR))  # (rows, shares)
        t, x = np.meshgrid(rows / len(self.tokens), np.log(-np.log(self.shares[1:])), indexing="ij")
        terms = np.stack([np.ones_like(t), t, t**2, t**3, x, x**2, t * x], -1).reshape(log.size, -1)
        coefficients, *_ = np.linalg.lstsq(terms, log.ravel(), rcond=None)
        tokens = self.tokens.copy()
        tokens[rows, 1:] = np.exp((log + (terms @ coefficients).reshape(log.shape)) / 2)
        return replace(self, tokens=tokens)

    def of_keep(self, block: int, keep: Keep) -> float:
        """Damage of a keep of `options` in a block."""
        return float(self.keeps[block][list(self.options).index(keep)])


@torch.no_grad()
def measure(model: nn.Module, way: str, options: Options, images: Iterable[Tensor], progress: Progress) -> Sensitivity:
    """Measures a model with fitted predictors on batches [B, C, H, W]; `model` is unchanged afterwards.

    way: of the stages (`sparsify.nn.tokens.WAYS`); options: keeps to try.
    """
    with _dense_with_stages(model, way) as (host, blocks, sparse):
        depth, shares = len(blocks), (1.0, *SHARES, 0.0)
        tokens, keeps = np.zeros((depth, len(shares))), np.zeros((depth, len(options)))
        done = patches = 0
        progress(0)
        for x in (part for batch in images for part in batch.split(CHUNK)):
            states = [host.start(x, host.full_grid)]  # before each block, and after the last
            for block in blocks:
                states.append(block(*states[-1]))
            dense, patches = _output(host, states[-1]), states[0][1].patches
            work, whole = 0, (len(shares) - 1 + len(options)) * depth * (depth + 1) // 2  # blocks that trials run
            for i, block in enumerate(blocks):
                for j, share in enumerate(shares[1:], 1):
                    if share or (host.reads_prefix and i == depth - 1):
                        block.stage = TokenStage(way, share, host.num_prefix_tokens)
                        tokens[i, j] += len(x) * _damage(host, blocks[i:], states[i], dense)
                        block.stage = None
                    work += depth - i
                    progress(done + len(x) * work // whole)
                for j, plans in enumerate(options.values()):
                    if plans[i].keeps is not None and i in sparse:
                        before, block.attn = block.attn, sparse[i].with_plan(plans[i])
                        keeps[i, j] += len(x) * _damage(host, blocks[i:], states[i], dense)
                        block.attn = before
                    work += depth - i
                    progress(done + len(x) * work // whole)
            done += len(x)
        tokens, keeps = tokens / max(done, 1), keeps / max(done, 1)
        empty = float(tokens[-1, -1]) if host.reads_prefix else None
    return Sensitivity(patches, shares[:-1], tokens[:, :-1], empty, options, keeps)


@contextmanager
def _dense_with_stages(model: nn.Module, way: str) -> Iterator[tuple[Any, list[Any], dict[int, SparseAttention]]]:
    """The model with dense attention and blocks that take stages, its blocks, and the sparse attention that each had."""
    blocks = cast(Any, list(cast(nn.Sequential, model.blocks)))
    attention = [cast(GraftedAttention, block.attn) for block in blocks]
    before = [getattr(block, "stage", None) for block in blocks]
    tracked = bool(getattr(model, "track_owners", False))
    former_way = next((stage.way for stage in before if stage is not None), way)
    sparse = {i: a for i, a in enumerate(attention) if isinstance(a, SparseAttention)}
    needs_owners = graft.needs_owners(model)
    token_models.remove(model)
    token_models.install(model, way, [None] * len(blocks), needs_owners)
    for block, module in zip(blocks, attention, strict=True):
        block.attn = DenseAttention(module).train(module.training)
    try:
        yield model, blocks, sparse
    finally:
        for block, module in zip(blocks, attention, strict=True):
            block.attn = module
        token_models.remove(model)
        if any(stage is not None for stage in before):
            token_models.install(model, former_way, [None if s is None else s.share for s in before], tracked)


def _damage(host: Any, blocks: list[Any], state: State, dense: Tensor) -> float:
    """Distance from the output `dense` when `blocks` run from `state`."""
    for block in blocks:
        state = block(*state)
    return distance(dense, _output(host, state), bool(host.num_classes))


def _output(host: Any, state: State) -> Tensor:
    """Logits, or for models without a classifier the normed tokens on the full grid."""
    h, tokens = state
    h = host.norm(host.whole(h, tokens) if host.full_grid else h)
    return host.forward_head(h) if host.num_classes else h
