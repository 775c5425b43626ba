"""Looks at what each attention of a grafted model is given, whatever its host; nothing stays when the look is over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from sparsify.nn import graft
from sparsify.nn.attention import GraftedAttention
from sparsify.nn.tokens import Tokens

Witness = Callable[[int, GraftedAttention, Tensor, Tensor, Tensor | None, Tokens | None], None]
"""Called with block, its attention, and what that is about to compute of: q, k [B, H, N, d], mask, tokens present."""

Stepped = Callable[[int, Tokens | None], None]
"""Called with block and what is known of the tokens behind it; None: they are all the patches."""


@contextlib.contextmanager
def attending(model: nn.Module, witness: Witness, stepped: Stepped = lambda block, tokens: None) -> Iterator[None]:
    """Inside, every forward pass of a grafted `model` tells `witness` what each block's `attend` is given.

    Later than `observe.watching`: whatever a host does to queries and keys has been done, and masks and tokens are known. A block
    whose patch rows nobody reads (`Stage.drop_all`) does not call `attend`, and is not heard of.
    """
    handles = [
        block.register_forward_hook(_behind(i, stepped)) for i, block in enumerate(cast(nn.Sequential, model.blocks))
    ]
    modules = list(graft.attention_modules(model).values())
    try:
        for i, module in enumerate(modules):
            vars(module)["attend"] = _told(i, module, module.attend, witness)
        yield
    finally:
        for module in modules:
            vars(module).pop("attend", None)
        for handle in handles:
            handle.remove()


def _told(
    block: int, module: GraftedAttention, attend: Callable[..., Tensor], witness: Witness
) -> Callable[..., Tensor]:
    def told(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: Tokens | None) -> Tensor:
        witness(block, module, q, k, mask, tokens)
        return attend(q, k, v, mask, tokens)

    return told


def _behind(block: int, stepped: Stepped) -> Callable[[nn.Module, tuple, Any], None]:
    def hook(module: nn.Module, args: tuple, out: Any) -> None:
        stepped(block, out[1] if isinstance(out, tuple) else None)

    return hook
