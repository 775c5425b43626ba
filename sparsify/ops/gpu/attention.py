"""Dense attention over tokens of different sizes on a GPU, as a torch.library op.

PyTorch's flash attention takes no mask of numbers, as which log s would be given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.ops.gpu.available import LARGEST_HEAD, usable
from sparsify.ops.gpu.launching import launch, op, power_of_two, tiles


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the op computes a call with these queries, keys and values. In float32 PyTorch's own takes such a mask."""
    if q.dtype == torch.float32 or not q.dtype == k.dtype == v.dtype:
        return False
    return q.shape[3] <= LARGEST_HEAD and q.shape[3] == v.shape[3] and usable(q, k, v)


@op(launches=1)
def sized_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor, scale: float) -> Tensor:
    """Attention with log s_j added to the logits of key j: [B, H, M, d] and [B, H, N, d] x 2 -> [B, M, H*d].

    size: float32 [B, N].
    """
    from sparsify.ops.gpu import attention_kernels as kernels

    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    B, H, M, d = q.shape
    N, DP = k.shape[2], power_of_two(d)
    out = q.new_empty(B, M, H * d)
    rows, warps = (128, 8) if M >= 512 else (64, 4)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    constants = dict(D=d, DP=DP, ROWS=rows, BLOCK=64 if DP <= 64 else 32, num_warps=warps, num_stages=3)
    arguments = (q, k, v, size.contiguous(), out, scale, *strides, M, N)
    launch(kernels.sized, (tiles(M, rows), H, B), arguments, q.device, **constants)
    return out


@sized_attention.fake
def _(q: Tensor, k: Tensor, v: Tensor, size: Tensor, scale: float) -> Tensor:
    B, H, M, d = q.shape
    return q.new_empty(B, M, H * d)
