"""Queries, keys and values of timm's attention classes, with norms and rotation, and what follows the attention.

The functions accept the host's module or the grafted module that shares its parts. Supported are:

    Attention        qkv; q/k norms                                                  (vision_transformer, deit, naflexvit)
    AttentionRope    qkv, or q_proj, k_proj, v_proj with fewer k and v heads; q/k norms; rotary embedding          (eva)
    EvaAttention     qkv with q_bias and v_bias of its own, or q_proj, k_proj, v_proj; q/k norms; rotary embedding (eva)
    Attention        qkv with q_bias and v_bias of its own; a bias of the logits by relative position             (beit)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional

SUPPORTED = (Attention, AttentionRope, EvaAttention, BeitAttention)


def linears(attention: nn.Module) -> list[nn.Linear]:
    """`qkv`, or `q_proj`, `k_proj` and `v_proj`."""
    host = cast(Any, attention)
    return [host.qkv] if host.qkv is not None else [host.q_proj, host.k_proj, host.v_proj]


def head_dim(attention: nn.Module) -> int:
    """d, size of a head."""
    host = cast(Any, attention)
    d = getattr(host, "head_dim", None)  # Beit's attention does not store it
    return int(d if d is not None else host.proj.in_features // heads_of(attention))


def heads_of(attention: nn.Module) -> int:
    """H, number of query heads."""
    return int(cast(Any, attention).num_heads)


def channels(attention: nn.Module) -> int:
    """C, channels of the input."""
    return int(linears(attention)[0].in_features)


def weight(attention: nn.Module) -> Tensor:
    """A weight with the dtype and device of the projections."""
    return linears(attention)[0].weight


def qkv_bias(attention: nn.Module) -> Tensor | None:
    """The bias of a fused `qkv` that is stored apart, [3*H*d]: q_bias, zeros, v_bias; None where it is the layer's own."""
    host = cast(Any, attention)
    if getattr(host, "q_bias", None) is None:
        return None
    return torch.cat((host.q_bias, host.k_bias, host.v_bias))


def heads(
    attention: nn.Module, x: Tensor, rope: Tensor | None = None, queries: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x [B, N, C] after norms and rotation: [B, H, N, d] each, one dtype.

    Args:
        rope: sines and cosines of the patch tokens, [N - P, 2d], or with leading dimensions that broadcast to B and H.
        queries: compute queries of this many leading rows only, at most P: q [B, H, queries, d]; None: of all.
    """
    if queries is not None and not all(
        type(f) is nn.Linear and type(f.weight) is nn.Parameter for f in linears(attention)
    ):
        q, k, v = heads(attention, x, rope)  # quantised, adapted or wrapped layers can only be called as a whole
        return q[:, :, :queries], k, v
    B, N, _ = x.shape
    d, host = head_dim(attention), cast(Any, attention)
    rows = x if queries is None else x[:, :queries]
    if host.qkv is None:
        parts = [
            t.reshape(B, t.shape[1], t.shape[2] // d, d) for t in (host.q_proj(rows), host.k_proj(x), host.v_proj(x))
        ]
    elif queries is None:
        qkv, bias = host.qkv(x), qkv_bias(attention)
        if bias is not None:
            qkv = qkv + bias
        parts = qkv.reshape(B, N, 3, qkv.shape[2] // (3 * d), d).unbind(2)  # (B, N, H, d)
    else:
        w, bias = host.qkv.weight, qkv_bias(attention)
        bias, inner = host.qkv.bias if bias is None else bias, w.shape[0] // 3
        q = functional.linear(rows, w[:inner], None if bias is None else bias[:inner])
        kv = functional.linear(x, w[inner:], None if bias is None else bias[inner:])
        parts = [q.reshape(B, queries, inner // d, d), *kv.reshape(B, N, 2, inner // d, d).unbind(2)]
    q, k, v = (t.transpose(1, 2) for t in parts)  # one copy in the backward; a permutation makes it two
    if getattr(host, "q_norm", None) is not None:
        q, k = host.q_norm(q), host.k_norm(k)
    if rope is not None:
        q, k = (_rotated(t, rope, int(host.num_prefix_tokens), bool(host.rotate_half)) for t in (q, k))
    groups = heads_of(attention) // k.shape[1]  # query heads that share a key head
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return q.to(v.dtype), k.to(v.dtype), v  # q/k norms and rotations of some hosts return float32


def _rotated(t: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """t [B, H, N, d] with rotated patch tokens; prefix tokens do not change."""
    if t.shape[2] <= prefix:
        return t
    patch = apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)
    return torch.cat([t[:, :, :prefix].to(patch.dtype), patch], 2)


def position_bias(attention: nn.Module, shared: Tensor | None = None) -> Tensor | None:
    """Bias of the logits by relative position, [1, H, N, N]: the module's own plus the one its model shares; or None."""
    host = cast(Any, attention)
    if shared is not None and shared.ndim == 3:
        shared = shared.unsqueeze(0)
    table = getattr(host, "relative_position_bias_table", None)
    if table is None:
        return shared
    index = host.relative_position_index  # (N, N)
    bias = table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).unsqueeze(0)
    return bias if shared is None else bias + shared


def close(attention: nn.Module, out: Tensor, x: Tensor) -> Tensor:
    """Norm, gate and projection of out [B, N, H*d] for the input rows x [B, N, C]: [B, N, C]."""
    host = cast(Any, attention)
    if getattr(host, "norm", None) is not None:
        out = host.norm(out)
    if getattr(host, "gate", None) is not None:
        out = out * host.gate(x).sigmoid()
    return host.proj_drop(host.proj(out))


def foldable(attention: nn.Module, rotary: bool) -> bool:
    """Whether a change of basis of q and k can be folded into the projections exactly: no q/k norm or rotary embedding
    follows them, and no two heads share keys. rotary: the model passes a rotary embedding."""
    host = cast(Any, attention)
    norms = (getattr(host, "q_norm", None), getattr(host, "k_norm", None))
    plain = all(norm is None or isinstance(norm, nn.Identity) for norm in norms)
    return plain and not rotary and getattr(host, "num_kv_groups", 1) == 1


@torch.no_grad()
def fold(attention: nn.Module, t_q: Tensor, t_k: Tensor, ranks: Sequence[int]) -> None:
    """Change the basis of every head: q <- T_q' q, k <- T_k' k, in the rows and biases of the projections; in place.

    Coordinates are then scaled, q by s and k by 1/s, so that both have rows of about the same norm: 8-bit formats with one
    scale for a whole weight need that. The s are powers of two, and the first ranks[h] coordinates of a head share one:
    every product and every comparison of distances stays equal to the bit.

    Args:
        t_q, t_k: [H, d, d] with T_q T_k' = I, so that q.k stays the same; float64 keeps that to rounding.
        ranks: of each head, the coordinates that rank its keys.
    """
    host, layers = cast(Any, attention), linears(attention)

    def part(i: int, tensor: Tensor) -> Tensor:
        return tensor.data.chunk(3)[i] if len(layers) == 1 else tensor.data

    q, k = (layers[0], layers[0]) if len(layers) == 1 else layers[:2]
    size_q, size_k = (_in_basis(part(i, x.weight), t).norm(dim=-1) for i, (x, t) in enumerate(((q, t_q), (k, t_k))))
    s = _scales(size_q, size_k, ranks).unsqueeze(1)  # (H, 1, d)
    bases = (t_q.to(s) * s, t_k.to(s) / s)
    for i, (layer, t) in enumerate(zip((q, k), bases, strict=True)):
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                _change_basis(part(i, tensor), t)
    if getattr(host, "q_bias", None) is not None:
        _change_basis(host.q_bias.data, bases[0])  # the bias of k is 0 in every basis


def _scales(q: Tensor, k: Tensor, ranks: Sequence[int]) -> Tensor:
    """The factor of each coordinate of q, from the norms of the rows of q and k, [H, d] each; 1 where one of them is 0."""
    ratio = k / q
    for h, r in enumerate(ranks):
        ratio[h, :r] = k[h, :r].max() / q[h, :r].max()
    s = torch.exp2((ratio.log2() / 2).round())
    return torch.where(s.isfinite() & (s > 0), s, 1)


def _change_basis(rows: Tensor, t: Tensor) -> None:
    """rows [H*d, C] or [H*d] <- T' rows, head by head, in place; t [H, d, d]."""
    rows.copy_(_in_basis(rows, t).reshape_as(rows))


def _in_basis(rows: Tensor, t: Tensor) -> Tensor:
    """T' rows, head by head: [H, d, C or 1], float64."""
    H, d, _ = t.shape
    return t.mT.double().to(rows.device) @ rows.double().reshape(H, d, -1)
