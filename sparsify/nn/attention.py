"""Sparse attention in the place of timm's `Attention`: same parameters, same names, plus a `predictor`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Attention
from torch import Tensor, nn

from sparsify import ops
from sparsify.nn.predictor import HeadLowrank, TokenLowrank
from sparsify.ops import auto, backends
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


class SparseAttention(nn.Module):
    """X' = softmax over the predicted keys and the tail, in the frame of timm's `Attention`.

        q, k, v = qkv(x);  out_i = sum over the b keys of i with the highest predicted score, and the tail;  proj(out)

    Takes over the host's submodules (qkv, q_norm, k_norm, gate, norm, proj, dropouts), so state dict keys stay timm's.

    Args:
        host: the dense attention.
        predictor: see `sparsify.nn.predictor`.
        sparsity: keep share, prefix tokens, tail.

    Attributes:
        execution: backend, precision and whether dense attention may stand in; `graft.set_execution` sets it.
    """

    def __init__(self, host: Attention, predictor: HeadLowrank | TokenLowrank, sparsity: Sparsity) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = host.num_heads, host.head_dim, host.attn_dim
        self.scale = host.head_dim**-0.5  # scaled_dot_product_attention's, which the host uses
        self.sparsity = sparsity
        self.execution = Execution()
        self.qkv, self.q_norm, self.k_norm = host.qkv, host.q_norm, host.k_norm
        self.predictor = predictor
        self.attn_drop, self.norm, self.gate = host.attn_drop, host.norm, host.gate
        self.proj, self.proj_drop = host.proj, host.proj_drop

    def qkv_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries, keys and values of x [B, N, C]: [B, H, N, d] each."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, C] -> [B, N, C]. attn_mask: bool (True: may attend) or additive, broadcastable to [B, H, N, N]."""
        if self.training and self.attn_drop.p > 0:
            raise NotImplementedError("attention dropout is not defined for sparse attention: set attn_drop_rate=0")
        if is_causal:
            attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = self.qkv_heads(x)  # (B, H, N, d)
        q, k = q.to(v.dtype), k.to(v.dtype)  # q/k norms of some hosts return float32
        out = self.norm(self.attend(q, k, v, attn_mask))  # (B, N, H*d)
        if gate is not None:
            out = out * gate
        return self.proj_drop(self.proj(out))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, H, N, d] x 3 -> [B, N, H*d], by the path that `execution` leads to."""
        e, predictor, spec = self.execution, self.predictor, self.spec(q.shape[2])
        needs_grad = torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad or backends.needs_grad(*predictor.parameters())
        )
        path = "reference" if needs_grad else backends.resolve(e.backend, q, mask)
        if e.dense_fallback and e.choose and not needs_grad and not self.training and backends.eager(q):
            path = e.choose.choose(self.call(q, mask, path, spec)).taken
        if path in auto.DENSE:
            return ops.dense(path, q, k, v, mask, self.scale, e.precision)
        return predictor.attend(q, k, v, mask, self.scale, spec, path, e.precision)

    def spec(self, N: int) -> Spec:
        """The constants of a call with N tokens."""
        s = self.sparsity
        return self.predictor.spec(self.scale, budget(s.keep, N), (s.prefix, s.tail, s.grid, s.cells, s.tile))

    def call(self, q: Tensor, mask: Tensor | None, sparse: str, spec: Spec) -> auto.Shape:
        """What decides how long the call takes: the key of `auto.Chooser`."""
        B, H, N, d = q.shape
        threads, masked = torch.get_num_threads(), mask is not None
        return auto.Shape(
            B, H, N, d, q.dtype, q.device.type, threads, masked, self.execution.precision, sparse,
            self.predictor.kind(), spec,
        )  # fmt: skip

    def dense(self) -> Attention:
        """The host again: timm's `Attention` over the same parameters."""
        with torch.device("meta"):
            host = Attention(
                self.qkv.in_features, self.num_heads, attn_head_dim=self.head_dim, dim_out=self.proj.out_features
            )
        for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"):
            setattr(host, name, getattr(self, name))
        return host.train(self.training)

    def extra_repr(self) -> str:
        s = self.sparsity
        return f"keep={s.keep:g}, tail={s.tail}, cells={s.cells[0]}x{s.cells[1]}, heads={self.num_heads}"
