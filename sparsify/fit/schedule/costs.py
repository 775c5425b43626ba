"""What a block costs at each number of tokens, as a sum of parts: in MACs, and in milliseconds timed on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.config import BlockPlan
from sparsify.fit.calibrate import budgets
from sparsify.fit.calibrate.budgets import Settings
from sparsify.measure.latency import interleaved
from sparsify.nn import hosts, projection
from sparsify.nn.attention import DenseAttention, GraftedAttention, SparseAttention
from sparsify.nn.importance import attention_importance, fitted_importance
from sparsify.nn.merging import cosines, rounds
from sparsify.nn.predictor import HeadLowrankPredictor
from sparsify.nn.tokens import TokenStage, TokenState
from sparsify.ops.macs import dense_macs, sparse_macs

POINTS = (0.1, 0.25, 0.5, 0.75, 1.0)  # fractions of the tokens at which parts are timed
ROUNDS = 9  # of every timing

Keep = float | None  # None: dense
Options = Mapping[Keep, Sequence[BlockPlan]]
"""Keeps that a block may have, and the plan of each block at it: what that keep costs, spent over the heads."""


class BlockCost(Protocol):
    """Cost of one block for one image, by its parts."""

    def attention(self, keep: Keep, n: int) -> float:
        """QK', AV, predictor and tail of n patch tokens."""

    def entering(self, n: int) -> float:
        """Norm, qkv and projection of n patch tokens."""

    def leaving(self, n: int) -> float:
        """Norm and MLP of n patch tokens: those left after the stage."""

    def stage(self, n: int, m: int) -> float:
        """Selecting m of n patch tokens."""

    def rounds(self, n: int, m: int) -> int:
        """Rounds in which m of n patch tokens are selected."""
        return int(m < n)

    def last(self, n: int) -> float:
        """Norm, projections and attention where n patch tokens enter and only the prefix is left after the stage."""

    def whole(self, keep: Keep, n: int, m: int) -> float:
        """The block with n patch tokens in and m out."""
        if m == 0:
            return self.last(n) + self.leaving(0)
        chosen = self.stage(n, m) if m < n else 0.0
        return self.entering(n) + self.attention(keep, n) + chosen + self.leaving(m)


class MacsCost(BlockCost):
    """MACs of a block with grafted attention, counted as `profile` does.

    prefix: P; ranking_rows: see `sparsify.nn.hosts.ranking_rows`; way: of the stages (`sparsify.nn.tokens.WAYS`);
    plans: of this block at each keep.
    """

    def __init__(
        self, block: nn.Module, prefix: int, ranking_rows: int, way: str, plans: Mapping[Keep, BlockPlan]
    ) -> None:
        self.attn = cast(GraftedAttention, block.attn)
        self.sparse = _by_keep(self.attn, plans)
        self.prefix, self.rows, self.way = prefix, max(1, ranking_rows), way
        self.width = self.attn.num_heads * self.attn.head_dim
        self.channels = projection.channels(self.attn)
        self.qkv = sum(map(_linears, projection.linears(self.attn)))
        self.norm = _norms(cast(nn.Module, block.norm1))
        self.mlp = _linears(cast(nn.Module, block.mlp)) + _norms(cast(nn.Module, block.norm2))
        self.proj = _linears(cast(nn.Module, self.attn.proj))

    def attention(self, keep: Keep, n: int) -> float:
        attn, N = self.attn, n + self.prefix
        shape = (1, attn.num_heads, N, attn.head_dim)
        if keep not in self.sparse:
            return dense_macs(shape, shape, shape)
        module = self.sparse[keep]
        n0 = module.sparsity.grid[0] * module.sparsity.grid[1]
        spec, p = module.spec_of(module.sparsity, N, n < n0), module.predictor
        shared, features = p.shared(attn.num_heads), p.compared(attn.num_heads, attn.head_dim)
        return sparse_macs(shape, p.macs(N, self.prefix), shared, features, spec, placed=True).total()

    def heads(self, settings: Settings, n: int) -> Tensor:
        """MACs of one head at each setting, for n patch tokens; of a block with a sparse attention."""
        module, N = next(iter(self.sparse.values())), n + self.prefix
        cells = replace(module.sparsity, cells=settings.cells).cells_of(N)
        folded = cast(HeadLowrankPredictor, module.predictor).a_q is None
        return budgets.costs(settings, N, module.head_dim, folded, module.spec(N, None), cells)

    def entering(self, n: int) -> float:
        return (n + self.prefix) * (self.norm + self.qkv + self.proj)

    def leaving(self, n: int) -> float:
        return (n + self.prefix) * self.mlp

    def stage(self, n: int, m: int) -> float:
        asking = self.rows * (n + self.prefix) * self.width
        if self.attn.importance is not None:
            asking = n * self.channels * (4 + 1)  # fvcore's estimate for a norm, and one product
        return asking + (cosines(n, m) * self.channels if self.way == "merge" else 0)

    def rounds(self, n: int, m: int) -> int:
        return len(rounds(n, m)) if self.way == "merge" and m < n else super().rounds(n, m)

    def last(self, n: int) -> float:
        P, N, query = self.prefix, n + self.prefix, self.width * self.channels
        rows = P * (query + self.proj) + P * N * 2 * self.width
        return N * (self.norm + self.qkv - query) + rows


def _linears(module: nn.Module) -> int:
    """MACs of one row through the linear layers of `module`."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _norms(module: nn.Module) -> int:
    """MACs of one row through a norm, by fvcore's estimate."""
    weights = [p for p in module.parameters() if p.dim() == 1]
    return 5 * weights[0].numel() if weights else 0


@torch.no_grad()
def macs_costs(model: nn.Module, way: str, options: Options) -> list[MacsCost]:
    """`MacsCost` of every block of a grafted model."""
    prefix, rows = hosts.num_prefix_tokens(model), hosts.ranking_rows(model)
    blocks = enumerate(cast(nn.Sequential, model.blocks))
    return [
        MacsCost(block, prefix, rows, way, {keep: plans[i] for keep, plans in options.items()}) for i, block in blocks
    ]


def _by_keep(attn: GraftedAttention, plans: Mapping[Keep, BlockPlan]) -> dict[Keep, SparseAttention]:
    """The attention of a block at each keep that is sparse there."""
    if not isinstance(attn, SparseAttention):
        return {}
    return {keep: attn.with_plan(plan) for keep, plan in plans.items() if plan.keeps is not None}


@dataclass(frozen=True)
class MeasuredCost(BlockCost):
    """Milliseconds for one image, interpolated linearly between the measured numbers of tokens."""

    counts: Sequence[int]  # patch tokens, ascending
    tables: Mapping[Any, Sequence[float]]  # part -> ms at each count; the parts of `attention` are ("attention", keep)

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
    middle = len(blocks) // 2
    block = blocks[middle]
    attn = cast(GraftedAttention, block.attn)
    sparse = _by_keep(attn, {keep: plans[middle] for keep, plans in options.items()})
    prefix, rows = hosts.num_prefix_tokens(model), hosts.ranking_rows(model)
    patches = int(np.prod(hosts.patch_grid(model)))
    dense: GraftedAttention = DenseAttention(attn)
    counts = sorted({max(2, round(share * patches)) for share in POINTS})
    tables: dict[Any, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    like = next(model.parameters())
    for n in counts:
        x = torch.randn(batch, prefix + n, projection.channels(attn), generator=generator).to(like)  # (B, N, C)
        rope = torch.randn(n, 2 * attn.head_dim, generator=generator).to(like) if attn.rotary else None
        q, k, v = attn.qkv_heads(x, rope)
        place = torch.arange(n, device=x.device).expand(batch, -1)
        tokens = TokenState(patches, place=place) if n < patches else TokenState(patches)
        bias = tokens._replace(place=place).bias_of(hosts.position_bias(model, attn), prefix)
        ranking: Callable[[], Tensor] = partial(attention_importance, q, k, attn.scale, None, rows, prefix, bias)
        if attn.importance is not None:
            ranking = partial(fitted_importance, x, attn.importance, None, prefix)
        stage = TokenStage(way, 0.8 * n / patches, prefix)
        runs: dict[Any, Callable[[], object]] = {
            "entering": partial(_entering, block, x, rope),
            "leaving": partial(_leaving, block, x),
            "ranking": ranking,
            "choosing": partial(stage, x, ranking(), tokens),
            "last": partial(attn.prefix_rows, x, max(prefix, 1), tokens, rope, bias),
        }
        for keep in options:
            runs["attention", keep] = partial(sparse.get(keep, dense).attend, q, k, v, bias, tokens)
        for part, timing in interleaved(cast(Any, runs), rounds=ROUNDS, device=x.device).items():
            tables.setdefault(part, []).append(timing.median / batch)
    return [MeasuredCost(counts, tables)] * len(blocks)


def _entering(block: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    """Norm, qkv and projection of x [B, N, C]."""
    block.attn.qkv_heads(block.norm1(x), rope)
    return block.attn.proj(x)


def _leaving(block: Any, x: Tensor) -> Tensor:
    """Norm and MLP of x [B, N, C]."""
    return x + block.mlp(block.norm2(x))
