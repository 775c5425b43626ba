"""Devices, processes and mixed precision, through Hugging Face accelerate: `torchrun` and `accelerate launch` just work."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState

from sparsify.errors import UsageError

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def resolve_precision(requested: str, device: str) -> str:
    """A key of `PRECISIONS`; `auto` is bfloat16 where the machine has instructions for it, else float32.

    Raises:
        UsageError: float16 on a CPU, which has no such arithmetic.
    """
    on_cpu = torch.device(device).type == "cpu"
    if requested == "float16" and on_cpu:
        raise UsageError("precision float16 needs a GPU: give float32, bfloat16 or auto")
    if requested != "auto":
        return requested
    fast = torch.cpu._is_avx512_bf16_supported() if on_cpu else torch.cuda.is_bf16_supported()
    return "bfloat16" if fast else "float32"


def accelerator(precision: str, device: str) -> Accelerator:
    """A new `Accelerator`: an earlier one of this process may have had another precision."""
    AcceleratorState._reset_state(reset_partial_state=False)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # the last block's patch rows may feed no loss
    on_cpu = torch.device(device).type == "cpu"
    return Accelerator(mixed_precision=PRECISIONS[precision], cpu=on_cpu, kwargs_handlers=[unused])
