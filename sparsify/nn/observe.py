"""Hooks on queries and keys inside a model, dense or sparse; all are removed when their context ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify.nn import attention
from sparsify.nn.attention import DenseAttention, Execution, GraftedAttention
from sparsify.nn.hosts import rotary, supported_attentions
from sparsify.nn.tokens import TokenState

Consumer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with block, q, k, v; [B, H, N, d] each, after norms and rotation."""

OnCall = Callable[[int, GraftedAttention, Tensor, Tensor, Tensor | None, TokenState | None], None]
"""Called before a block's `attend` with block, module, q, k [B, H, N, d], mask, and the tokens present."""

AfterBlock = Callable[[int, TokenState | None], None]
"""Called with block and the tokens after it; None: all patches, in order."""


@contextlib.contextmanager
def watching(model: nn.Module, consume: Consumer) -> Iterator[None]:
    """Inside the context, every forward pass of `model` hands each block's q, k, v to `consume`, with their gradients.

    In a dense model, timm's attention is replaced by our dense attention over the same parameters meanwhile.
    """
    watched: dict[str, GraftedAttention] = attention.attention_modules(model)
    hosts: dict[str, nn.Module] = {}
    if not watched:
        hosts = supported_attentions(model)
        watched = {name: DenseAttention(host, rotary(model)).train(host.training) for name, host in hosts.items()}
        for name, module in watched.items():
            module.execution = Execution("reference")  # torch's own attention, which the host uses
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


@contextlib.contextmanager
def watching_calls(
    model: nn.Module, on_call: OnCall, after_block: AfterBlock = lambda block, tokens: None
) -> Iterator[None]:
    """Inside the context, `on_call` sees the arguments of every block's `attend` in a grafted `model`.

    Later than `watching`: mask and tokens are known too. A block that computes only its prefix rows, because its stage
    drops all patch tokens, does not call `attend`.
    """
    modules = list(attention.attention_modules(model).values())

    def reporting(i: int, module: GraftedAttention, attend: Callable[..., Tensor], *call: Any) -> Tensor:
        q, k, _, mask, tokens = call
        on_call(i, module, q, k, mask, tokens)
        return attend(*call)

    def hook(i: int, block: nn.Module, args: tuple, out: Any) -> None:
        after_block(i, out[1] if isinstance(out, tuple) else None)

    handles = [
        block.register_forward_hook(partial(hook, i)) for i, block in enumerate(cast(nn.Sequential, model.blocks))
    ]
    try:
        for i, module in enumerate(modules):
            vars(module)["attend"] = partial(reporting, i, module, module.attend)
        yield
    finally:
        for module in modules:
            vars(module).pop("attend", None)
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def observe(model: nn.Module, batches: Iterable[Tensor], consume: Consumer) -> int:
    """Runs `model` over `batches` [B, C, H, W] and hands every block's q, k, v to `consume`.

    Returns:
        Number of images.
    """
    images = 0
    with watching(model, consume):
        for x in batches:
            model(x)
            images += x.shape[0]
    return images
