"""Which path `backend=auto` takes in each block of a model, and what was measured for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.nn.attention import SparseAttention
from sparsify.nn.graft import sparse_modules
from sparsify.ops import backends

Inputs = dict[str, Tensor]


@torch.inference_mode()
def taken(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Runs `model(images)` once; blocks with the same shape and decision share an entry, see `Profile.choices`."""
    inputs: Inputs = {}
    modules = sparse_modules(model)
    handles = [m.register_forward_pre_hook(_keep(inputs, name), with_kwargs=True) for name, m in modules.items()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    found: list[dict[str, Any]] = []
    for block, (name, module) in enumerate(modules.items()):
        entry = _entry(module, inputs[name])
        same = next((each for each in found if {**each, "blocks": []} == {**entry, "blocks": []}), None)
        if same is None:
            found.append(entry)
            same = entry
        same["blocks"].append(block)
    return found


def _entry(module: SparseAttention, x: Tensor) -> dict[str, Any]:
    q, e = module.qkv_heads(x)[2], module.execution  # v has the dtype that all three are cast to
    sparse = backends.resolve(e.backend, q)
    shape = module.call(q, None, sparse, module.spec(q.shape[2]))
    entry: dict[str, Any] = {"blocks": [], "shape": shape.as_dict(), "taken": sparse, "ms": {}}
    if e.dense_fallback and e.choose:
        choice = e.choose.choose(shape)
        return entry | {"taken": choice.taken, "ms": dict(choice.ms), "reason": choice.reason}
    return entry | {"reason": "no dense fallback for this model"}


def _keep(inputs: Inputs, name: str):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs[name] = args[0] if args else kwargs["x"]

    return hook


__all__ = ["taken"]
