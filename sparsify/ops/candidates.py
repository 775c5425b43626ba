"""The calls that `auto.py` times: each path of one shape, on random tensors laid out as `qkv` gives them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.ops import attention

if TYPE_CHECKING:
    from sparsify.ops.spec import Shape

Candidates = dict[str, Callable[[], object]]


def make(shape: Shape) -> Candidates:
    """Path -> call: the sparse form by `shape.sparse`; dense attention by our own kernel where there is one; SDPA."""
    device, scale = torch.device(shape.device), shape.head_dim**-0.5
    draw = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device=device, dtype=torch.float32)

    B, H, N, d = shape[:4]
    q, k, v = random(B, N, 3, H, d).to(shape.dtype).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d), strided
    mask = None
    if shape.masked:
        mask = torch.ones(N, N, dtype=torch.bool, device=device)
        mask[:, N // 2 + 1 :: 7] = False
    size = place = None
    if shape.merged:
        size = 1 + random(B, N).abs()
    if shape.placed:
        patches = shape.spec.grid[0] * shape.spec.grid[1]
        place = (torch.arange(N - shape.spec.prefix, device=device) % patches).expand(B, -1).contiguous()
    found: Candidates = {shape.sparse: _sparse(shape, q, k, v, mask, size, place, scale, random)}
    for path in ("dense-cpu", "sdpa") if shape.sparse == "cpu" else ("sdpa",):
        found[path] = partial(attention.dense, path, q, k, v, mask, scale, shape.precision, size)
    return found


def _sparse(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, size: Tensor | None, place: Tensor | None,
    scale: float, random: Callable[..., Tensor],
) -> Callable[[], object]:  # fmt: skip
    kind, H, N, d = shape.kind, shape.heads, shape.tokens, shape.head_dim
    how = (shape.spec, shape.sparse, shape.precision)
    if kind.name != "token":
        a_q = a_k = None
        if kind.name == "head":
            a_q, a_k = random(H, d, kind.rank_max), random(H, d, kind.rank_max)
        ranks = spread(H, kind.rank_sum, kind.rank_max)
        return partial(attention.head_lowrank, q, k, v, a_q, a_k, mask, size, place, ranks, scale, *how)
    r, c = kind.rank_max, kind.channels
    w_down, w_up = random(r, N).softmax(-1), random(kind.up_heads, r, N)
    w, b = (random(c, d), random(c)) if c else (None, None)
    return partial(attention.token_lowrank, q, k, v, w_down, w_up, w, b, w, b, mask, size, place, scale, scale, *how)


def spread(heads: int, total: int, largest: int) -> tuple[int, ...]:
    """Ranks of `heads` heads with that sum and that largest one, the others as even as can be."""
    if heads == 1:
        return (largest,)
    low, more = divmod(total - largest, heads - 1)
    return (largest, *(low + (i < more) for i in range(heads - 1)))
