"""Looks at queries and keys inside a model, dense or sparse, without keeping anything on the modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from timm.layers import Attention
from torch import Tensor, nn

from sparsify.nn import graft
from sparsify.nn.attention import GraftedAttention

Consumer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with block, q, k, v; [B, H, N, d] each, after q/k normalisation."""


@contextlib.contextmanager
def watching(model: nn.Module, consume: Consumer) -> Iterator[None]:
    """Inside, every forward pass of `model` hands each block's q, k, v to `consume`, with their gradients."""
    handles = [host.qkv.register_forward_hook(_hook(i, host, consume)) for i, host in enumerate(hosts(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def observe(model: nn.Module, batches: Iterable[Tensor], consume: Consumer) -> int:
    """Runs `model` over `batches` [B, C, H, W] and hands every block's q, k, v to `consume`.

    Returns:
        Images seen.
    """
    seen = 0
    with watching(model, consume):
        for x in batches:
            model(x)
            seen += x.shape[0]
    return seen


def hosts(model: nn.Module) -> list[Attention | GraftedAttention]:
    """The attention of each block, dense or grafted."""
    return [*graft.attention_modules(model).values()] or [*graft.check(model).values()]


def heads(host: Attention | GraftedAttention, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, d] each, after q/k normalisation, of what `qkv` gives, [B, N, 3*H*d]."""
    B, N, _ = out.shape
    q, k, v = out.reshape(B, N, 3, host.num_heads, host.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return host.q_norm(q), host.k_norm(k), v


def _hook(
    block: int, host: Attention | GraftedAttention, consume: Consumer
) -> Callable[[nn.Module, tuple, Tensor], None]:
    def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
        consume(block, *heads(host, out))

    return hook
