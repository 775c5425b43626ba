"""Queries, keys and values of timm's attention classes, and what stands between them and their product.

One vocabulary for all that are understood, on the host's module or on the grafted one that took its parts over:

    Attention        qkv; q/k norms                                                  (vision_transformer, deit, naflexvit)
    AttentionRope    qkv, or q_proj, k_proj, v_proj with fewer k and v heads; q/k norms; rotary embedding          (eva)
    EvaAttention     qkv with q_bias and v_bias of its own, or q_proj, k_proj, v_proj; q/k norms; rotary embedding (eva)
    Attention        qkv with q_bias and v_bias of its own; a bias of the logits by relative position             (beit)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional

UNDERSTOOD = (Attention, AttentionRope, EvaAttention, BeitAttention)


def linears(attention: nn.Module) -> list[nn.Linear]:
    """`qkv`, or `q_proj`, `k_proj` and `v_proj`."""
    host = cast(Any, attention)
    return [host.qkv] if host.qkv is not None else [host.q_proj, host.k_proj, host.v_proj]


def head_dim(attention: nn.Module) -> int:
    """d, size of a head."""
    host = cast(Any, attention)
    own = getattr(host, "head_dim", None)  # Beit's keeps none
    return int(own if own is not None else host.proj.in_features // heads_of(attention))


def heads_of(attention: nn.Module) -> int:
    """H, heads of the queries."""
    return int(cast(Any, attention).num_heads)


def channels(attention: nn.Module) -> int:
    """C, what comes in."""
    return int(linears(attention)[0].in_features)


def weight(attention: nn.Module) -> Tensor:
    """A weight whose dtype and device are the projections'."""
    return linears(attention)[0].weight


def own_bias(attention: nn.Module) -> Tensor | None:
    """The bias of a fused `qkv` that is not the linear layer's own, [3*H*d]: q_bias, zeros, v_bias."""
    host = cast(Any, attention)
    if getattr(host, "q_bias", None) is None:
        return None
    return torch.cat((host.q_bias, host.k_bias, host.v_bias))


def heads(attention: nn.Module, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x [B, N, C] as their product meets them: [B, H, N, d] each, one dtype.

    rope: sines and cosines of the patch tokens, [N - P, 2d], or with leading dimensions that broadcast to B and H.
    """
    B, N, _ = x.shape
    d, host = head_dim(attention), cast(Any, attention)
    if host.qkv is not None:
        qkv, bias = host.qkv(x), own_bias(attention)
        if bias is not None:
            qkv = qkv + bias
        parts = qkv.reshape(B, N, 3, -1, d).unbind(2)  # (B, N, H, d)
    else:
        parts = tuple(linear(x).reshape(B, N, -1, d) for linear in linears(attention))
    q, k, v = (t.transpose(1, 2) for t in parts)  # one copy in the backward; a permutation makes it two
    return _placed(attention, q, k, v, rope)


def prefix_heads(
    attention: nn.Module, x: Tensor, prefix: int, rope: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `heads`, but only the queries of the P prefix tokens are computed: q [B, H, P, d]."""
    B, N, _ = x.shape
    d, host, rows = head_dim(attention), cast(Any, attention), x[:, :prefix]
    if not all(type(linear) is nn.Linear and type(linear.weight) is nn.Parameter for linear in linears(attention)):
        q, k, v = heads(attention, x, rope)  # quantised, adapted or wrapped: a layer computes what it computes, whole
        return q[:, :, :prefix], k, v
    if host.qkv is not None:
        w, bias = host.qkv.weight, host.qkv.bias if own_bias(attention) is None else own_bias(attention)
        inner = w.shape[0] // 3
        q = functional.linear(rows, w[:inner], None if bias is None else bias[:inner])
        kv = functional.linear(x, w[inner:], None if bias is None else bias[inner:])
        k, v = kv.reshape(B, N, 2, -1, d).unbind(2)
    else:
        q, k, v = host.q_proj(rows), host.k_proj(x).reshape(B, N, -1, d), host.v_proj(x).reshape(B, N, -1, d)
    q = q.reshape(B, prefix, -1, d)
    return _placed(attention, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rope)


def _placed(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q/k norms, rotary embedding, and keys and values repeated where several heads share one."""
    host = cast(Any, attention)
    if getattr(host, "q_norm", None) is not None:
        q, k = host.q_norm(q), host.k_norm(k)
    if rope is not None:
        q, k = (_rotated(t, rope, int(host.num_prefix_tokens), bool(host.rotate_half)) for t in (q, k))
    shared = heads_of(attention) // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return q.to(v.dtype), k.to(v.dtype), v  # q/k norms and rotations of some hosts return float32


def _rotated(t: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """t [B, H, N, d], its patch tokens turned by their place; rows of prefix tokens alone stay."""
    if t.shape[2] <= prefix:
        return t
    patch = apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)
    return torch.cat([t[:, :, :prefix].to(patch.dtype), patch], 2)


def position_bias(attention: nn.Module, shared: Tensor | None = None) -> Tensor | None:
    """What is added to the logits by relative position, [1, H, N, N]: the module's own and what its model shares."""
    host = cast(Any, attention)
    if shared is not None and shared.ndim == 3:
        shared = shared.unsqueeze(0)
    table = getattr(host, "relative_position_bias_table", None)
    if table is None:
        return shared
    index = host.relative_position_index  # (N, N)
    own = table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).unsqueeze(0)
    return own if shared is None else own + shared


def close(attention: nn.Module, out: Tensor, x: Tensor) -> Tensor:
    """What follows the attention, for rows x [B, N, C] of the input: norm, gate and projection of out [B, N, H*d]."""
    host = cast(Any, attention)
    if getattr(host, "norm", None) is not None:
        out = host.norm(out)
    if getattr(host, "gate", None) is not None:
        out = out * host.gate(x).sigmoid()
    return host.proj_drop(host.proj(out))


def foldable(attention: nn.Module, rotary: bool) -> bool:
    """Whether a change of basis of q and k can be folded into the projections exactly: nothing stands between them and
    the product, and no two heads share their keys. rotary: the model passes a rotary embedding."""
    host = cast(Any, attention)
    norms = (getattr(host, "q_norm", None), getattr(host, "k_norm", None))
    plain = all(norm is None or isinstance(norm, nn.Identity) for norm in norms)
    return plain and not rotary and getattr(host, "num_kv_groups", 1) == 1


@torch.no_grad()
def fold(attention: nn.Module, t_q: Tensor, t_k: Tensor) -> None:
    """Change the basis of every head: q <- T_q' q, k <- T_k' k, in the rows and biases of the projections; in place.

    Args:
        t_q, t_k: [H, d, d] with T_q T_k' = I, so that q.k stays the same; float64 keeps that to rounding.
    """
    host, layers = cast(Any, attention), linears(attention)
    if len(layers) == 1:
        (qkv,) = layers
        for tensor in (qkv.weight, qkv.bias):
            if tensor is not None:
                q, k, _ = tensor.data.chunk(3)
                _turn(q, t_q)
                _turn(k, t_k)
        if getattr(host, "q_bias", None) is not None:
            _turn(host.q_bias.data, t_q)  # that of k is 0, in every basis
        return
    for linear, t in ((layers[0], t_q), (layers[1], t_k)):
        for tensor in (linear.weight, linear.bias):
            if tensor is not None:
                _turn(tensor.data, t)


def _turn(rows: Tensor, t: Tensor) -> None:
    """rows [H*d, C] or [H*d], head by head times T' [H, d, d], in place."""
    H, d, _ = t.shape
    turned = t.mT.double().to(rows.device) @ rows.double().reshape(H, d, -1)
    rows.copy_(turned.reshape_as(rows))
