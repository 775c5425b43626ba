"""The calls that `auto.py` times: each path of one shape, on random tensors laid out as `qkv` gives them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparsify.ops import attention
from sparsify.ops.selection import Context
from sparsify.ops.spec import Shape

Sparse = Callable[[Tensor, Tensor, Tensor, Context], object]
"""The sparse form of q, k, v [B, H, N, d] and a context, by a module's own predictor."""
Candidates = dict[str, Callable[[], object]]


def make(shape: Shape, sparse: Sparse | None) -> Candidates:
    """Path -> call: the sparse form, unless `sparse` is None; dense attention by our own kernel if available; SDPA, on
    GPUs also by each of torch's kernels that takes the shape."""
    device, scale = torch.device(shape.device), shape.head_dim**-0.5
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    B, H, N, d = shape[:4]
    q, k, v = random(B, N, 3, H, d).to(shape.dtype).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d), strided
    mask = size = place = None
    if shape.masked:
        mask = torch.ones(N, N, dtype=torch.bool, device=device)
        mask[:, N // 2 + 1 :: 7] = False
    if shape.merged:
        size = 1 + random(B, N).abs()
    if shape.placed:
        patches = shape.spec.grid[0] * shape.spec.grid[1]
        place = (torch.arange(N - shape.spec.prefix, device=device) % patches).expand(B, -1).contiguous()
    candidates: Candidates = {}
    if sparse is not None:
        candidates[shape.sparse] = partial(sparse, q, k, v, Context(mask, size, place))
    own = ("dense-cpu",) if shape.sparse == "cpu" else ()
    for path in (*own, "sdpa", *(attention.SDPA if shape.device_type == "cuda" else ())):
        call = partial(attention.dense, path, q, k, v, mask, scale, shape.precision, size)
        if path not in attention.SDPA or _runs(call):
            candidates[path] = call
    return candidates


def _runs(call: Callable[[], object]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each reason why a kernel does not take a call
        try:
            call()
        except RuntimeError:
            return False
    return True
