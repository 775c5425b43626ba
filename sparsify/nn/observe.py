"""Looks at queries and keys inside a model, dense or sparse, without keeping anything on the modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from sparsify.nn import graft
from sparsify.nn.attention import DenseAttention, GraftedAttention
from sparsify.nn.hosts import rotary
from sparsify.ops.spec import Execution

Consumer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with block, q, k, v; [B, H, N, d] each, as their product meets them (norms and rotations done)."""


@contextlib.contextmanager
def watching(model: nn.Module, consume: Consumer) -> Iterator[None]:
    """Inside, every forward pass of `model` hands each block's q, k, v to `consume`, with their gradients.

    A dense model has our dense attention over the same parameters in the place of timm's for as long.
    """
    watched: dict[str, GraftedAttention] = graft.attention_modules(model)
    hosts: dict[str, nn.Module] = {}
    if not watched:
        hosts = graft.check(model)
        watched = {name: DenseAttention(host, rotary(model)).train(host.training) for name, host in hosts.items()}
        for name, module in watched.items():
            module.execution = Execution("reference")  # torch's own attention, as the host has it
            model.set_submodule(name, module)
    for i, module in enumerate(watched.values()):
        module.watch = partial(consume, i)
    try:
        yield
    finally:
        for module in watched.values():
            module.watch = None
        for name, host in hosts.items():
            model.set_submodule(name, host)


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
