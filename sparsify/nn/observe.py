"""Looks at queries and keys inside a model, dense or sparse; nothing stays on the modules when the look is over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify.nn import attention
from sparsify.nn.attention import DenseAttention, Execution, GraftedAttention
from sparsify.nn.hosts import check, rotary
from sparsify.nn.tokens import TokenState

Consumer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with block, q, k, v; [B, H, N, d] each, as their product meets them (norms and rotations done)."""

Witness = Callable[[int, GraftedAttention, Tensor, Tensor, Tensor | None, TokenState | None], None]
"""Called with block, its attention, and what that is about to compute of: q, k [B, H, N, d], mask, tokens present."""

Stepped = Callable[[int, TokenState | None], None]
"""Called with block and what is known of the tokens behind it; None: they are all the patches."""


@contextlib.contextmanager
def watching(model: nn.Module, consume: Consumer) -> Iterator[None]:
    """Inside, every forward pass of `model` hands each block's q, k, v to `consume`, with their gradients.

    A dense model has our dense attention over the same parameters in the place of timm's for as long.
    """
    watched: dict[str, GraftedAttention] = attention.attention_modules(model)
    hosts: dict[str, nn.Module] = {}
    if not watched:
        hosts = check(model)
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


@contextlib.contextmanager
def attending(model: nn.Module, witness: Witness, stepped: Stepped = lambda block, tokens: None) -> Iterator[None]:
    """Inside, every forward pass of a grafted `model` tells `witness` what each block's `attend` is given.

    Later than `watching`: whatever a host does to queries and keys has been done, and masks and tokens are known. A block
    whose patch rows nobody reads (`Stage.drop_all`) does not call `attend`, and is not heard of.
    """
    handles = [
        block.register_forward_hook(_behind(i, stepped)) for i, block in enumerate(cast(nn.Sequential, model.blocks))
    ]
    modules = list(attention.attention_modules(model).values())
    try:
        for i, module in enumerate(modules):
            vars(module)["attend"] = _told(i, module, module.attend, witness)
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
        Images seen.
    """
    seen = 0
    with watching(model, consume):
        for x in batches:
            model(x)
            seen += x.shape[0]
    return seen


def _told(
    block: int, module: GraftedAttention, attend: Callable[..., Tensor], witness: Witness
) -> Callable[..., Tensor]:
    def told(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: TokenState | None) -> Tensor:
        witness(block, module, q, k, mask, tokens)
        return attend(q, k, v, mask, tokens)

    return told


def _behind(block: int, stepped: Stepped) -> Callable[[nn.Module, tuple, Any], None]:
    def hook(module: nn.Module, args: tuple, out: Any) -> None:
        stepped(block, out[1] if isinstance(out, tuple) else None)

    return hook
