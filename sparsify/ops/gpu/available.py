"""Whether the Triton kernels compute a call: the one place that decides."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from sparsify.ops import backends

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)  # Triton compiles no tensor-core instructions for older ones
MOST_TOKENS = 4096  # of an image whose tokens are merged or ranked: one program holds them all in its registers
LARGEST_HEAD, MOST_CHANNELS = 128, 4096


def usable(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels compute a call on x and others; else the reference does.

    They do on a GPU with triton; not where a gradient is needed, for an export, in a torch.jit trace or under a
    transformation of torch.func.
    """
    if x.device.type != "cuda" or x.dtype not in DTYPES:
        return False
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or backends.needs_grad(x, *others):
        return False
    return not _transformed() and supported(x.device.index)


def _transformed() -> bool:
    return not torch.compiler.is_compiling() and backends.transformed()


@torch.compiler.assume_constant_result
def supported(index: int | None) -> bool:
    """Whether a GPU can run the kernels, and triton is installed; index: of the device, None: the current one."""
    return has_triton() and capability(index) >= LEAST_CAPABILITY


@cache
def has_triton() -> bool:
    """Whether triton can be imported; it is not imported here."""
    return importlib.util.find_spec("triton") is not None


@cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return torch.cuda.get_device_capability(index)
