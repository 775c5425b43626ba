"""How much the model's output moves when one block alone lets tokens leave, or attends to fewer keys.

Measured once, on unlabelled images: each trial starts from the dense model's input of its block, so that a pass through
all settings of all blocks costs about as much as forty passes through the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.fit.schedule.costs import Keep, Options
from sparsify.measure.accuracy import distance
from sparsify.nn import token_models
from sparsify.nn.attention import DenseAttention, GraftedAttention, SparseAttention
from sparsify.nn.predictor import TokenLowrankPredictor
from sparsify.nn.tokens import TokenStage, TokenState

SHARES = (0.85, 0.7, 0.5, 0.35, 0.2, 0.1)  # of the patch tokens, tried after each block
CHUNK = 16  # images computed together
FLOOR = 1e-5  # damage that measurement does not tell from none


@dataclass(frozen=True)
class Sensitivity:
    """Damage to the output, by block; the unit is that of `calibration.distance`.

    Attributes:
        patches: n0.
        shares: tried, descending, 1 first.
        tokens: [depth, len(shares)], of a stage after the block.
        empty: of leaving nothing but prefix tokens after the last block; None where that cannot be.
        options: keeps of the attention; None: dense.
        keeps: [depth, len(options)], of the block's attention.
    """

    patches: int
    shares: tuple[float, ...]
    tokens: np.ndarray
    empty: float | None
    options: tuple[Keep, ...]
    keeps: np.ndarray

    def of_tokens(self, block: int, counts: np.ndarray) -> np.ndarray:
        """Damage of leaving that many tokens after a block; between the measured shares its root is linear.

        Counts below the lowest share are not known and cost as much as that; 0 is for the last block (`empty`).
        """
        known = np.maximum.accumulate(self.tokens[block].clip(0))  # fewer tokens never count as better
        found = np.interp(-np.asarray(counts) / self.patches, [-s for s in self.shares], np.sqrt(known)) ** 2
        return np.where(np.asarray(counts) == 0, max(0.0, self.empty or 0.0), found)

    def smoothed(self) -> Sensitivity:
        """The same with less noise in `tokens`: the geometric mean of what was measured and of a smooth fit.

        log D_i(s) = a_0 + a_1 t + a_2 t^2 + a_3 t^3 + b_1 x + b_2 x^2 + c t x,    t = i / depth, x = log(-log s)

        fitted by least squares. What a schedule pays is differences between neighbouring blocks, where noise of a fifth
        makes it let too many tokens leave at once. Blocks that no stage moves (the last) stay as they are.
        """
        rows = np.flatnonzero(self.tokens.max(1) > FLOOR)
        if len(rows) < 4:
            return self
        log = np.log(np.maximum(self.tokens[rows, 1:], FLOOR))  # (rows, shares)
        t, x = np.meshgrid(rows / len(self.tokens), np.log(-np.log(self.shares[1:])), indexing="ij")
        terms = np.stack([np.ones_like(t), t, t**2, t**3, x, x**2, t * x], -1).reshape(log.size, -1)
        found, *_ = np.linalg.lstsq(terms, log.ravel(), rcond=None)
        tokens = self.tokens.copy()
        tokens[rows, 1:] = np.exp((log + (terms @ found).reshape(log.shape)) / 2)
        return replace(self, tokens=tokens)

    def of_keep(self, block: int, keep: Keep) -> float:
        return float(self.keeps[block][self.options.index(keep)])


@torch.no_grad()
def measure(
    model: nn.Module, way: str, options: Options, images: Iterable[Tensor],
    progress: Callable[[int], None] = lambda done: None,
) -> Sensitivity:  # fmt: skip
    """Measures a model with fitted predictors. `model` is as it was afterwards.

    Args:
        way: of the stages (`sparsify.nn.tokens.WAYS`).
        options: keeps to try, with their cells; None: dense.
        images: batches [B, C, H, W]; progress: called with images done.
    """
    with _laid_bare(model, way) as (host, blocks, sparse):
        depth = len(blocks)
        may_end_empty = host.reads_prefix
        shares, empty = (1.0, *SHARES), 0.0
        tokens, keeps = np.zeros((depth, len(shares))), np.zeros((depth, len(options)))
        done = patches = 0
        for x in (part for batch in images for part in batch.split(CHUNK)):
            states, dense, patches = _dense_pass(host, blocks, x)
            for i, block in enumerate(blocks):
                for j, share in enumerate(shares[1:], 1):
                    block.stage = TokenStage(way, share, host.num_prefix_tokens)
                    tokens[i, j] += len(x) * _damage(host, blocks[i:], states[i], dense)
                    block.stage = None
                for j, (keep, cells) in enumerate(options.items()):
                    if keep is not None and i in sparse:
                        own, attn = block.attn, sparse[i]
                        full = attn.sparsity
                        block.attn, attn.sparsity = attn, replace(full, keep=keep, cells=cells)
                        keeps[i, j] += len(x) * _damage(host, blocks[i:], states[i], dense)
                        block.attn, attn.sparsity = own, full
            if may_end_empty:
                blocks[-1].stage = TokenStage(way, 0.0, host.num_prefix_tokens)
                empty += len(x) * _damage(host, blocks[-1:], states[-1], dense)
                blocks[-1].stage = None
            done += len(x)
            progress(done)
    keeps[[i for i in range(depth) if i not in sparse]] = 0
    n = max(done, 1)
    return Sensitivity(patches, shares, tokens / n, empty / n if may_end_empty else None, tuple(options), keeps / n)


@contextmanager
def _laid_bare(model: nn.Module, way: str) -> Iterator[tuple[Any, list[Any], dict[int, SparseAttention]]]:
    """The model with dense attention and empty stages, its blocks, and the sparse attention that each had."""
    blocks = cast(Any, list(cast(nn.Sequential, model.blocks)))
    attention = [cast(GraftedAttention, block.attn) for block in blocks]
    before = [getattr(block, "stage", None) for block in blocks]
    follow = bool(getattr(model, "follow", False))
    own_way = next((stage.way for stage in before if stage is not None), way)
    token_models.remove(model)
    token_models.install(
        model,
        way,
        [None] * len(blocks),
        any(isinstance(a, SparseAttention) and isinstance(a.predictor, TokenLowrankPredictor) for a in attention),
    )
    for block, module in zip(blocks, attention, strict=True):
        dense = DenseAttention(cast(Any, module)).train(module.training)
        dense.execution = module.execution
        block.attn = dense
    try:
        yield model, blocks, {i: a for i, a in enumerate(attention) if isinstance(a, SparseAttention)}
    finally:
        for block, module in zip(blocks, attention, strict=True):
            block.attn = module
        token_models.remove(model)
        if any(stage is not None for stage in before):
            token_models.install(model, own_way, [None if s is None else s.share for s in before], follow)


def _dense_pass(host: Any, blocks: list[Any], x: Tensor) -> tuple[list[tuple[Tensor, TokenState]], Tensor, int]:
    """Input of every block, the output, and n0."""
    h, tokens = host.start(x, host.full_grid)
    states = []
    for block in blocks:
        states.append((h, tokens))
        h, tokens = block(h, tokens)
    return states, _output(host, h, tokens), tokens.patches


def _damage(host: Any, blocks: list[Any], state: tuple[Tensor, TokenState], dense: Tensor) -> float:
    h, tokens = state
    for block in blocks:
        h, tokens = block(h, tokens)
    return distance(dense, _output(host, h, tokens), bool(host.num_classes))


def _output(host: Any, h: Tensor, tokens: TokenState) -> Tensor:
    """Logits, or for models without a classifier the normed tokens on the full grid."""
    h = host.norm(host.whole(h, tokens) if host.full_grid else h)
    return host.forward_head(h) if host.num_classes else h
