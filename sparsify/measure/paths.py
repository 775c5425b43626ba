"""Which path `backend=auto` takes in each block of a model, and what was measured for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.nn.attention import GraftedAttention, SparseAttention, attention_modules
from sparsify.nn.tokens import TokenState
from sparsify.ops import backends

Entry = dict[str, Any]


@torch.inference_mode()
def taken(model: nn.Module, images: Tensor) -> list[Entry]:
    """Runs `model(images)` once; blocks with the same shape and decision share an entry, see `Profile.choices`."""
    modules = attention_modules(model)
    entries: dict[str, Entry] = {}
    for name, module in modules.items():
        _watch(module, entries, name)
    try:
        model(images)
    finally:
        for module in modules.values():
            del vars(module)["attend"]
    found: list[Entry] = []
    for block, name in enumerate(modules):
        entry = entries.get(name) or _entry({}, "sdpa", "prefix rows only: no patch token goes on")
        same = next((each for each in found if {**each, "blocks": []} == entry), None)
        if same is None:
            found.append(entry)
            same = entry
        same["blocks"].append(block)
    return found


def _watch(module: GraftedAttention, entries: dict[str, Entry], name: str) -> None:
    """Until `attend` is deleted from the module again, a call of it leaves an entry; blocks call it past `forward`."""
    attend = module.attend

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: TokenState | None) -> Tensor:
        entries[name] = (
            _sparse(module, q, mask, tokens) if isinstance(module, SparseAttention) else _dense(module, q, mask)
        )
        return attend(q, k, v, mask, tokens)

    vars(module)["attend"] = watched


def _sparse(module: SparseAttention, q: Tensor, mask: Tensor | None, tokens: TokenState | None) -> Entry:
    e = module.execution
    sparse = backends.resolve(e.backend, q, mask)
    shape = module.call(q, mask, sparse, module.spec(q.shape[2], tokens))
    if tokens is not None:
        shape = shape._replace(merged=tokens.size is not None, placed=tokens.place is not None)
    if e.dense_fallback and e.choose:
        choice = e.choose.choose(shape)
        return _entry(shape.as_dict(), choice.taken, choice.reason) | {"ms": dict(choice.ms)}
    return _entry(shape.as_dict(), sparse, "no dense fallback for this model")


def _dense(module: GraftedAttention, q: Tensor, mask: Tensor | None) -> Entry:
    B, H, N, d = q.shape
    path = "dense-cpu" if backends.resolve(module.execution.backend, q, mask) == "cpu" else "sdpa"
    shape = {"batch": B, "heads": H, "tokens": N, "head_dim": d, "dtype": str(q.dtype).removeprefix("torch.")}
    return _entry(shape, path, "dense by its configuration")


def _entry(shape: Entry, path: str, reason: str) -> Entry:
    return {"blocks": [], "shape": shape, "taken": path, "ms": {}, "reason": reason}
