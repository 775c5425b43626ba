"""Which path `backend=auto` takes in each block of a model, and what was measured for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.nn import observe
from sparsify.nn.attention import DenseAttention, GraftedAttention, SparseAttention, attention_modules
from sparsify.nn.tokens import TokenState
from sparsify.ops import backends

Entry = dict[str, Any]


@torch.inference_mode()
def taken(model: nn.Module, images: Tensor) -> list[Entry]:
    """Runs `model(images)` once; blocks with the same shape and decision share an entry, see `Profile.choices`."""
    entries: dict[int, Entry] = {}

    def on_call(
        block: int, module: GraftedAttention, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None
    ) -> None:
        if isinstance(module, SparseAttention):
            entries[block] = _sparse(module, q, mask, tokens)
        elif isinstance(module, DenseAttention):
            entries[block] = _dense(module, q, mask, tokens)

    with observe.watching_calls(model, on_call):
        model(images)
    found: list[Entry] = []
    for block in range(len(attention_modules(model))):
        entry = entries.get(block) or _entry({}, "sdpa", "prefix rows only: no patch token goes on")
        same = next((each for each in found if {**each, "blocks": []} == entry), None)
        if same is None:
            found.append(entry)
            same = entry
        same["blocks"].append(block)
    return found


def _sparse(module: SparseAttention, q: Tensor, mask: Tensor | None, tokens: TokenState | None) -> Entry:
    spec = module.spec(q.shape[2], tokens)
    taken, choice = module.path(q, mask, tokens, spec)
    shape = module.shape(q, mask, backends.resolve(module.execution.backend, q, mask), spec, tokens).as_dict()
    if choice is None:
        return _entry(shape, taken, "no dense fallback for this model")
    return _entry(shape, taken, choice.reason) | {"ms": dict(choice.ms)}


def _dense(module: DenseAttention, q: Tensor, mask: Tensor | None, tokens: TokenState | None) -> Entry:
    B, H, N, d = q.shape
    shape = {"batch": B, "heads": H, "tokens": N, "head_dim": d, "dtype": str(q.dtype).removeprefix("torch.")}
    return _entry(shape, module.path(q, mask, tokens), "dense by its configuration")


def _entry(shape: Entry, path: str, reason: str) -> Entry:
    return {"blocks": [], "shape": shape, "taken": path, "ms": {}, "reason": reason}
