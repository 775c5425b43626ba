"""Attention in the place of timm's `Attention`: same parameters, same names. Sparse with a `predictor`, or dense.

Both know tokens that have left or were merged (`sparsify.nn.tokens`), which timm's own does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Attention
from torch import Tensor, nn

from sparsify import ops
from sparsify.config import grid_of, growth
from sparsify.nn.predictor import HeadLowrank, TokenLowrank
from sparsify.nn.tokens import Tokens
from sparsify.ops import auto, backends, tails
from sparsify.ops.spec import Execution, Spec, budget


@dataclass(frozen=True)
class Sparsity:
    """Constants of one block's sparse attention; the words are those of `sparsify.config.SparsityConfig`."""

    keep: float
    prefix: int
    tail: str
    grid: tuple[int, int]
    cells: tuple[int, int]
    tile: tuple[int, ...] = ()  # empty: one key set for each query

    def cells_of(self, N: int) -> tuple[int, int]:
        """Grid of cells where only N tokens are present: fewer, by the rule of `SparsityConfig.with_cells`."""
        own = self.prefix + self.grid[0] * self.grid[1]
        if own <= N:
            return self.cells
        return grid_of(self.cells[0] * self.cells[1] * growth(N) / growth(own))


class GraftedAttention(nn.Module):
    """The frame of timm's `Attention`: q, k, v = qkv(x); attention; proj. How queries meet keys is the subclass's.

    Takes over the host's submodules (qkv, q_norm, k_norm, gate, norm, proj, dropouts), so state dict keys stay timm's.

    Attributes:
        execution: backend, precision and whether dense attention may stand in; `graft.set_execution` sets it.
    """

    def __init__(self, host: Attention) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = host.num_heads, host.head_dim, host.attn_dim
        self.scale = host.head_dim**-0.5  # scaled_dot_product_attention's, which the host uses
        self.qkv, self.q_norm, self.k_norm = host.qkv, host.q_norm, host.k_norm
        self.attn_drop, self.norm, self.gate = host.attn_drop, host.norm, host.gate
        self.proj, self.proj_drop = host.proj, host.proj_drop
        self.execution = Execution()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: Tokens | None) -> Tensor:
        """[B, H, N, d] x 3 -> [B, N, H*d]."""
        raise NotImplementedError

    def qkv_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries, keys and values of x [B, N, C]: [B, H, N, d] each, one dtype."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # one copy in the backward; a permutation makes it two
        q, k = self.q_norm(q), self.k_norm(k)
        return q.to(v.dtype), k.to(v.dtype), v  # q/k norms of some hosts return float32

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, C] -> [B, N, C]. attn_mask: bool (True: may attend) or additive, broadcastable to [B, H, N, N]."""
        if is_causal:
            attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return self.close(self.attend(*self.qkv_heads(x), attn_mask, None), x)

    def close(self, out: Tensor, x: Tensor) -> Tensor:
        """What follows the attention, for rows x [B, N, C] of the input: gate, norm and projection of out [B, N, H*d]."""
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def prefix_rows(self, x: Tensor, prefix: int, tokens: Tokens) -> Tensor:
        """The rows of the P prefix tokens alone, which attend to all keys: x [B, N, C] -> [B, P, C]."""
        self._refuse_dropout()
        B, N, _ = x.shape
        H, d, rows = self.num_heads, self.head_dim, x[:, :prefix]
        if type(self.qkv) is nn.Linear and type(self.qkv.weight) is nn.Parameter:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = nn.functional.linear(rows, weight[: H * d], None if bias is None else bias[: H * d])
            kv = nn.functional.linear(x, weight[H * d :], None if bias is None else bias[H * d :])
        else:  # quantised, adapted or wrapped: it computes what it computes, whole
            qkv = self.qkv(x)
            q, kv = qkv[:, :prefix, : H * d], qkv[..., H * d :]
        q = self.q_norm(q.reshape(B, prefix, H, d).transpose(1, 2))  # (B, H, P, d)
        k, v = kv.reshape(B, N, 2, H, d).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d)
        k = self.k_norm(k)
        out = ops.dense("sdpa", q.to(v.dtype), k.to(v.dtype), v, None, self.scale, "input", tokens.size)
        return self.close(out, rows)

    def _refuse_dropout(self) -> None:
        if self.training and self.attn_drop.p > 0:
            raise NotImplementedError("attention dropout is not defined for grafted attention: set attn_drop_rate=0")

    def dense(self) -> Attention:
        """The host again: timm's `Attention` over the same parameters."""
        with torch.device("meta"):
            host = Attention(
                self.qkv.in_features, self.num_heads, attn_head_dim=self.head_dim, dim_out=self.proj.out_features
            )
        for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"):
            setattr(host, name, getattr(self, name))
        return host.train(self.training)


class DenseAttention(GraftedAttention):
    """Every query attends to every token that is present."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: Tokens | None) -> Tensor:
        """[B, H, N, d] x 3 -> [B, N, H*d]."""
        self._refuse_dropout()
        size = None if tokens is None else tokens.size
        runs_here = not backends.needs_grad(q, k, v) and (backends.eager(q) or backends.compiling())
        if runs_here and backends.resolve(self.execution.backend, q, mask) == "cpu":
            return ops.dense("dense-cpu", q, k, v, None, self.scale, self.execution.precision, size)
        return ops.dense("sdpa", q, k, v, mask, self.scale, "input", size)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}"


class SparseAttention(GraftedAttention):
    """X' = softmax over the predicted keys and the tail.

        q, k, v = qkv(x);  out_i = sum over the b keys of i with the highest predicted score, and the tail;  proj(out)

    Args:
        host: the dense attention.
        predictor: see `sparsify.nn.predictor`.
        sparsity: keep share, prefix tokens, tail.
    """

    def __init__(self, host: Attention, predictor: HeadLowrank | TokenLowrank, sparsity: Sparsity) -> None:
        super().__init__(host)
        self.sparsity = sparsity
        self.predictor = predictor

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, C] -> [B, N, C]; see `GraftedAttention.forward`."""
        return super().forward(x, attn_mask, is_causal)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: Tokens | None) -> Tensor:
        """[B, H, N, d] x 3 -> [B, N, H*d], by the path that `execution` leads to."""
        self._refuse_dropout()
        e, predictor, spec = self.execution, self.predictor, self.spec(q.shape[2], tokens)
        size, place = (None, None) if tokens is None else (tokens.size, tokens.place)
        trains = backends.needs_grad(q, k, v)
        needs_grad = trains or backends.needs_grad(*predictor.parameters())
        if trains:
            path = backends.training(e.backend, q, mask)
        else:  # a predictor that learns alone gets no gradient of its choice, and the reference says so
            path = "reference" if needs_grad else backends.resolve(e.backend, q, mask)
        if e.dense_fallback and e.choose and not needs_grad and not self.training and backends.eager(q):
            shape = self.call(q, mask, path, spec)._replace(merged=size is not None, placed=place is not None)
            path = e.choose.choose(shape).taken
        if path in auto.DENSE:
            return ops.dense(path, q, k, v, mask, self.scale, e.precision, size)
        return predictor.attend(q, k, v, mask, tokens, self.scale, spec, path, e.precision)

    def spec(self, N: int, tokens: Tokens | None = None) -> Spec:
        """The constants of a call with N tokens; cells are fewer where tokens have left."""
        if tokens is None or tokens.place is None:
            return self.spec_of(self.sparsity, N, False)
        spec = self.spec_of(self.sparsity, N, True)  # places are on the grid of this image, which may have another size
        return spec._replace(grid=tails.patch_grid(tokens.patches, self.sparsity.grid))

    def spec_of(self, s: Sparsity, N: int, left: bool) -> Spec:
        """The same for other constants; `left`: tokens have left before."""
        cells = s.cells_of(N) if left else s.cells
        return self.predictor.spec(self.scale, budget(s.keep, N), (s.prefix, s.tail, s.grid, cells, s.tile))

    def call(self, q: Tensor, mask: Tensor | None, sparse: str, spec: Spec) -> auto.Shape:
        """What decides how long the call takes: the key of `auto.Chooser`."""
        B, H, N, d = q.shape
        threads, masked = torch.get_num_threads(), mask is not None
        return auto.Shape(
            B, H, N, d, q.dtype, q.device.type, threads, masked, self.execution.precision, sparse,
            self.predictor.kind(), spec,
        )  # fmt: skip

    def extra_repr(self) -> str:
        s = self.sparsity
        return f"keep={s.keep:g}, tail={s.tail}, cells={s.cells[0]}x{s.cells[1]}, heads={self.num_heads}"
