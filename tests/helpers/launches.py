"""Operators that a model launches on a GPU, counted without one: a pass of fake tensors that are said to be on cuda.

A fake tensor has no values: a pass that reads one (`.item()`, `nonzero`, a branch on it) fails, so one that ends has not
synchronised with the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.ops.gpu import attention, available, tokens

VIEWS = """
    view _unsafe_view expand t transpose permute unbind select slice unsqueeze squeeze split split_with_sizes alias detach
    as_strided chunk empty empty_like new_empty
""".split()
OURS = {
    op.function.__name__: op.launches
    for op in (
        tokens.fitted_importance, tokens.attention_importance, tokens.merge_tokens, tokens.choose_tokens,
        attention.sized_attention,
    )
}  # fmt: skip


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func.namespace, func._schema.name.split("::")[1]
        if space == "sparsify":
            self.counts[name] += OURS[name]
        elif space == "aten" and name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _Flash(TorchFunctionMode):
    """torch picks the attention of a GPU by asking it: here it is flash attention, or, with a mask, efficient attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if kwargs.get("attn_mask") is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], scale=kwargs.get("scale"))[0]
        bias = kwargs["attn_mask"].expand(*args[0].shape[:3], args[1].shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            *args[:3], bias, False, scale=kwargs.get("scale")
        )[0]


@contextmanager
def a_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Inside, fake tensors on cuda are on a GPU of that compute capability."""
    with mock.patch.object(available, "capability", lambda index: capability), FakeTensorMode():
        yield


def launched(call: Callable[[], object]) -> Counter[str]:
    """Launches of a call by operator; in `a_gpu`."""
    with torch.no_grad(), _Flash(), _Counting() as mode:
        call()
    return mode.counts


def on_gpu(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters and buffers of a model as fake tensors on cuda; in `a_gpu`."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device="cuda")
        for name, t in named
    }
