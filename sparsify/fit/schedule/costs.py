"""What a block costs at each number of tokens, as a sum of parts, and those parts as MACs (`seconds` measures times)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, cast

import torch
from torch import nn

from sparsify.nn import hosts, projection
from sparsify.nn.attention import GraftedAttention, SparseAttention
from sparsify.nn.merging import cosines
from sparsify.ops.macs import dense_macs, sparse_macs

Keep = float | None  # None: dense
Options = Mapping[Keep, tuple[int, int]]
"""Keeps that a block may have, and the grid of cells for each (unused where dense)."""


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

    def last(self, n: int) -> float:
        """Norm, projections and attention where n patch tokens enter and only the prefix is left after the stage."""

    def whole(self, keep: Keep, n: int, m: int) -> float:
        """The block with n patch tokens in and m out."""
        if m == 0:
            return self.last(n) + self.leaving(0)
        chosen = self.stage(n, m) if m < n else 0.0
        return self.entering(n) + self.attention(keep, n) + chosen + self.leaving(m)


class MacsCost(BlockCost):
    """MACs, counted as `profile` does.

    Args:
        block: a block with grafted attention.
        prefix: P; ranking_rows: see `sparsify.nn.hosts.ranking_rows`.
        way: of the stages (`sparsify.nn.tokens.WAYS`).
    """

    def __init__(self, block: nn.Module, prefix: int, ranking_rows: int, way: str, options: Options) -> None:
        self.options = options
        self.attn = cast(GraftedAttention, block.attn)
        self.prefix, self.rows, self.way = prefix, max(1, ranking_rows), way
        self.width = self.attn.num_heads * self.attn.head_dim
        self.channels = projection.channels(self.attn)
        self.qkv = sum(map(_linears, projection.linears(self.attn)))
        self.norm = _norms(cast(nn.Module, block.norm1))
        self.mlp = _linears(cast(nn.Module, block.mlp)) + _norms(cast(nn.Module, block.norm2))

    def attention(self, keep: Keep, n: int) -> float:
        attn, N = self.attn, n + self.prefix
        shape = (1, attn.num_heads, N, attn.head_dim)
        if keep is None or not isinstance(attn, SparseAttention):
            return dense_macs(shape, shape, shape)
        sparsity = replace(attn.sparsity, keep=keep, cells=self.options[keep])
        n0 = sparsity.grid[0] * sparsity.grid[1]
        spec, p = attn.spec_of(sparsity, N, n < n0), attn.predictor
        features = p.compared(attn.num_heads, attn.head_dim)
        return sparse_macs(shape, p.macs(N, self.prefix), p.shared(), features, spec, placed=True).total()

    def entering(self, n: int) -> float:
        return (n + self.prefix) * (self.norm + self.qkv + _linears(cast(nn.Module, self.attn.proj)))

    def leaving(self, n: int) -> float:
        return (n + self.prefix) * self.mlp

    def stage(self, n: int, m: int) -> float:
        asking = self.rows * (n + self.prefix) * self.width
        if self.attn.importance is not None:
            asking = n * self.channels * (4 + 1)  # fvcore's estimate for a norm, and one product
        if self.way != "merge":
            return asking
        return asking + cosines(n, m) * self.channels

    def last(self, n: int) -> float:
        P, N, query = self.prefix, n + self.prefix, self.width * self.channels
        rows = P * (query + _linears(cast(nn.Module, self.attn.proj))) + P * N * 2 * self.width
        return N * (self.norm + self.qkv - query) + rows


def _linears(module: nn.Module) -> int:
    """MACs of one row through the linear layers of `module`."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _norms(module: nn.Module) -> int:
    """MACs of one row through a norm, by fvcore's estimate."""
    weights = [p for p in module.parameters() if p.dim() == 1]
    return 5 * weights[0].numel() if weights else 0


@torch.no_grad()
def macs_costs(model: nn.Module, way: str, options: Options) -> list[BlockCost]:
    """`MacsCost` of every block of a grafted model."""
    prefix, rows = hosts.num_prefix_tokens(model), hosts.ranking_rows(model)
    return [MacsCost(block, prefix, rows, way, options) for block in cast(nn.Sequential, model.blocks)]
