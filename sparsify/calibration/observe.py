"""Looks at queries and keys inside a dense model, batch by batch, without keeping anything on the modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from timm.layers import Attention
from torch import Tensor, nn

from sparsify.nn import graft

Consumer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with block, q, k, v; [B, H, N, d] each, after q/k normalisation."""


@torch.inference_mode()
def observe(model: nn.Module, batches: Iterable[Tensor], consume: Consumer) -> int:
    """Runs the dense `model` over `batches` [B, C, H, W] and hands every block's q, k, v to `consume`.

    Returns:
        Images seen.
    """
    hosts = list(graft.check(model).values())
    handles = [host.qkv.register_forward_hook(_hook(i, host, consume)) for i, host in enumerate(hosts)]
    seen = 0
    try:
        for x in batches:
            model(x)
            seen += x.shape[0]
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _hook(block: int, host: Attention, consume: Consumer) -> Callable[[nn.Module, tuple, Tensor], None]:
    def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
        B, N, _ = out.shape
        q, k, v = out.reshape(B, N, 3, host.num_heads, host.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        consume(block, host.q_norm(q), host.k_norm(k), v)  # (B, H, N, d)

    return hook
