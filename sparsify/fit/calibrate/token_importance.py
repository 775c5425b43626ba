"""The fitted importance in closed form: a linear map predicts from a token what later blocks of the dense model read of it.

With c_lj the length of what token j adds to the ranking rows (the cls row, or the mean query's) in block l,

    c_lj = | sum over heads h of  a_lhj W_lh v_lhj |            a: their attention, W_lh: the columns of proj of head h
    t_ij = log mean over l >= i of c_lj
    w_i, b_i = argmin  sum over images and tokens j of (w . norm(x_ij) + b - t_ij)^2  +  lambda |w|^2

x_ij is token j after the attention of block i, where a stage would stand. The Gram matrices are summed batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify.config import SparsityConfig
from sparsify.nn import attention, graft, hosts, projection, token_models
from sparsify.nn.importance import TINY, features, ranking_attention
from sparsify.nn.token_blocks import AnyTokenBlock

RIDGE = 1e-4  # lambda as a fraction of the mean diagonal of the features' Gram matrix
CHUNK = 16  # maximum images per forward pass
HELD = 1 << 27  # maximum features of all blocks in memory: 512 MB, or those of one image


@torch.no_grad()
def fit(model: nn.Module, images: Iterable[Tensor], done: Callable[[int], None] = lambda block: None) -> None:
    """Fits the importance of every block of a grafted model, in place, by passes of its dense twin over [B, C, H, W].

    done: called when a block of a batch is done, counted from 0.
    """
    dense = graft.graft(graft.dense_twin(model), SparsityConfig(keep="dense"))
    attentions = list(attention.attention_modules(dense).values())
    depth = len(attentions)
    token_models.install(dense, "merge", [None] * depth, False)
    rows, prefix = hosts.ranking_rows(dense), hosts.num_prefix_tokens(dense)
    fits = [_ImportanceFit() for _ in range(depth)]
    patches = hosts.num_tokens(dense) - prefix
    size = max(1, min(CHUNK, HELD // (depth * patches * projection.channels(attentions[0]))))
    for x in (part for batch in images for part in batch.split(size)):
        inputs, read = [], []
        for i, (features_of_block, read_of_block) in enumerate(_blocks(dense, x, rows, prefix)):
            inputs.append(features_of_block)
            read.append(read_of_block)
            done(i)
        later = torch.zeros_like(read[0])
        for i in reversed(range(depth)):
            later = later + read[i]
            fits[i].add(inputs[i], (later / (depth - i)).clamp_min(TINY).log())
    for module, block_fit in zip(attention.attention_modules(model).values(), fits, strict=True):
        module.importance = block_fit.solve().to(module.proj.weight)


def _blocks(dense: nn.Module, x: Tensor, rows: int, prefix: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Block by block: features [B, n, C] of the patch tokens, and what the ranking rows read of them, [B, n]."""
    host = cast(Any, dense)
    h, tokens = host.start(x, False)
    for block in cast(Iterable[AnyTokenBlock], host.blocks):
        bias = block.bias(tokens)
        h, q, k, v = block.attended(h, tokens, bias)
        a = ranking_attention(q, k, block.attn.scale, None, rows, bias).mean(2)  # (B, H, N)
        out = block.attn.proj.weight.unflatten(1, (v.shape[1], -1)).float()  # (C, H, d)
        added = torch.einsum("bhn,bhnd,chd->bnc", a, v.float(), out)
        yield features(h[:, prefix:]), added.norm(dim=-1)[:, prefix:]
        h = block.after(h)


class _ImportanceFit:
    """The ridge regression of one block: running sums over tokens, float64."""

    gram: Any = 0.0
    cross: Any = 0.0

    def add(self, f: Tensor, t: Tensor) -> None:
        """Adds features [B, n, C] and targets [B, n]."""
        f, t = f.flatten(0, 1), t.flatten()
        f = torch.cat([f, torch.ones_like(f[:, :1])], 1)  # (rows, C + 1): the last is the offset
        self.gram = self.gram + (f.mT @ f).double()
        self.cross = self.cross + (f.mT @ t).double()

    def solve(self) -> Tensor:
        """w and b, [C + 1]."""
        damp = RIDGE * self.gram.diagonal()[:-1].mean() * torch.ones_like(self.cross)
        damp[-1] = 0
        return torch.linalg.solve(self.gram + damp.diag(), self.cross)
