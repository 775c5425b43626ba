"""Costs in milliseconds: the parts of a block, timed on this machine at a few numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.fit.schedule.costs import BlockCost, Keep, Options
from sparsify.measure.latency import interleaved
from sparsify.nn import hosts, projection
from sparsify.nn.attention import DenseAttention, GraftedAttention, SparseAttention
from sparsify.nn.importance import attention_importance, fitted_importance
from sparsify.nn.tokens import TokenStage, TokenState

POINTS = (0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the tokens at which parts are timed
ROUNDS = 9


class MeasuredCost(BlockCost):
    """Milliseconds for one image, interpolated linearly between the measured numbers of tokens.

    Args:
        counts: patch tokens, ascending.
        tables: part -> ms at each count; the parts of `attention` are ("attention", keep).
    """

    def __init__(self, counts: Sequence[int], tables: dict[Any, Sequence[float]]) -> None:
        self.counts, self.tables = counts, tables

    def at(self, part: Any, n: int) -> float:
        """ms of a part for n patch tokens."""
        return float(np.interp(n, self.counts, self.tables[part]))

    def attention(self, keep: Keep, n: int) -> float:
        return self.at(("attention", keep), n)

    def entering(self, n: int) -> float:
        return self.at("entering", n)

    def leaving(self, n: int) -> float:
        return self.at("leaving", n) * (1.0 if n else 0.0)

    def stage(self, n: int, m: int) -> float:
        return self.at("ranking", n) + self.at("choosing", n)

    def last(self, n: int) -> float:
        return self.at("last", n)


@torch.no_grad()
def measured_costs(model: nn.Module, way: str, options: Options, batch: int) -> list[BlockCost]:
    """`MeasuredCost` of every block: one block is timed, as all blocks of a plain ViT are alike."""
    blocks = cast(Any, list(cast(nn.Sequential, model.blocks)))
    block = blocks[len(blocks) // 2]
    attn = cast(GraftedAttention, block.attn)
    prefix, rows = int(cast(int, model.num_prefix_tokens)), hosts.ranking_rows(model)
    patches = int(np.prod(hosts.patch_grid(model)))
    dense = DenseAttention(attn)
    counts = sorted({max(2, round(share * patches)) for share in POINTS})
    tables: dict[Any, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    like = next(model.parameters())
    for n in counts:
        x = torch.randn(batch, prefix + n, projection.channels(attn), generator=generator).to(like)  # (B, N, C)
        rope = None
        if attn.rotary:
            rope = torch.randn(n, 2 * attn.head_dim, generator=generator).to(like)
        q, k, v = attn.qkv_heads(x, rope)
        place = torch.arange(n, device=x.device).expand(batch, -1)
        tokens = TokenState(patches, place=place) if n < patches else TokenState(patches)
        bias = tokens._replace(place=place).bias_of(hosts.position_bias(model, attn), prefix)
        ranking: Callable[[], Tensor] = partial(attention_importance, q, k, attn.scale, None, rows, prefix, bias)
        if attn.importance is not None:
            ranking = partial(fitted_importance, x[:, prefix:], attn.importance, None)
        stage = TokenStage(way, 0.8 * n / patches, prefix)
        runs: dict[Any, Callable[[], object]] = {
            "entering": partial(_entering, block, x, rope),
            "leaving": partial(_leaving, block, x),
            "ranking": ranking,
            "choosing": partial(stage, x, ranking(), tokens),
            "last": partial(attn.prefix_rows, x, max(prefix, 1), tokens, rope, bias),
        }
        for keep, cells in options.items():
            module: GraftedAttention = dense
            if keep is not None and isinstance(attn, SparseAttention):
                module = SparseAttention(attn, attn.predictor, replace(attn.sparsity, keep=keep, cells=cells))
            runs["attention", keep] = partial(module.attend, q, k, v, bias, tokens)
        for part, timing in interleaved(cast(Any, runs), rounds=ROUNDS).items():
            tables.setdefault(part, []).append(timing.median / batch)
    return [MeasuredCost(counts, cast(Any, tables))] * len(blocks)


def _entering(block: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    """Norm, qkv and projection of x [B, N, C]."""
    block.attn.qkv_heads(block.norm1(x), rope)
    return block.attn.proj(x)


def _leaving(block: Any, x: Tensor) -> Tensor:
    """Norm and MLP of x [B, N, C]."""
    return x + block.mlp(block.norm2(x))
