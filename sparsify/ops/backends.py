"""What computes the sparse form: the CPU kernels of `cpu/` where they can run, on GPUs `masked`, else the reference.

    backend         auto: the kernels where they are available, on a GPU masked attention, else the reference; cpu; reference
    precision       input: computed and stored in the dtype of the inputs; bf16: float32 models store q, k, v in bfloat16

Nothing here measures: `auto.py` decides whether dense attention is used instead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sparsify.ops.cpu import kernels

BACKENDS = ("auto", "cpu", "reference")
PRECISIONS = ("input", "bf16")
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
MOST_MASKED = 1 << 26  # pairs whose bias `masked.py` keeps for the backward, or computes at once: 256 MB in float32


@torch.compiler.assume_constant_result
def not_built() -> str | None:
    """Why the kernels cannot be used on this machine, in one line; None: they can (built at the first call)."""
    return kernels.available()


def unavailable(device: torch.device, dtype: torch.dtype, biased: bool = False) -> str | None:
    """Why the kernels cannot compute tensors of that device and dtype, in one line; None: they can.

    biased: something is added to the logits of every call.
    """
    if biased:
        return "this model adds position biases to its logits, which the kernels do not take"
    if device.type != "cpu":
        return f"the kernels compute on cpu, not on {device.type}"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels compute float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return not_built()


def resolve(backend: str, q: Tensor, mask: Tensor | None = None) -> str:
    """'cpu', 'masked' or 'reference': what computes the sparse form of a call with queries q [B, H, N, d].

    'masked' on GPUs, where the reference would launch many small kernels for each chunk of rows.
    """
    if (
        torch.compiler.is_exporting() or backend == "reference"
    ):  # a program is to run elsewhere; nothing is built for it
        return "reference"
    if q.device.type == "cuda":
        _, H, N, _ = q.shape
        whole = mask is None and H * N * N <= MOST_MASKED
        return "masked" if whole and (eager(q) or compiling()) else "reference"
    return "cpu" if kernels.supports(q, mask) and not_built() is None else "reference"


def training(backend: str, q: Tensor, mask: Tensor | None = None) -> str:
    """'cpu', 'masked' or 'reference': what computes a call whose gradients are needed.

    'reference' if the user asked for it, with a mask, and under a compiler. It stores nothing of size N x N for the
    backward, as 'masked' does, so it also computes the longest sequences. A torch.jit trace has one path for all calls.
    """
    if torch.jit.is_tracing():
        return resolve(backend, q, mask)
    if backend == "reference" or mask is not None or not eager(q):
        return "reference"
    if resolve(backend, q) == "cpu":
        return "cpu"
    B, H, N, _ = q.shape
    return "masked" if B * H * N * N <= MOST_MASKED else "reference"


def describe(backend: str, precision: str, device: torch.device, dtype: torch.dtype, biased: bool = False) -> str:
    """What `backend` resolves to, in words: 'cpu (avx512bf16)', 'reference', 'reference (no compiler found)'."""
    if backend == "reference":
        return "reference"
    if device.type == "cuda" and not biased:
        return "masked"
    reason = unavailable(device, dtype, biased)
    if reason is not None:
        return f"reference ({reason})"
    stored = ", q, k and v in bfloat16" if precision == "bf16" and dtype == torch.float32 else ""
    return f"cpu ({kernels.isa()}{stored})"


def note(backend: str, device: torch.device, dtype: torch.dtype, biased: bool = False) -> str:
    """One line if the user would expect the kernels and they cannot be used; else ''."""
    if backend != "reference" and device.type == "cuda":
        return "sparse attention has no kernels for GPUs and saves no time there; fewer tokens do"
    reason = None if backend == "reference" else unavailable(device, dtype, biased)
    return "" if reason is None else f"sparse attention is computed by the slow PyTorch reference: {reason}"


def eager(q: Tensor) -> bool:
    """Whether a call with these queries computes now: no compiler, exporter or tracer, no fake or meta tensor, no dispatch
    mode that has to see every op, no transformation."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode() or transformed():
        return False
    return type(q) in (Tensor, torch.nn.Parameter) and not q.is_meta


def transformed() -> bool:
    """Whether a transformation of torch.func or forward-mode differentiation is active: kernels would lose derivatives."""
    return forward_mode() or torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether tensors may have a forward-mode derivative."""
    return forward_ad._current_level >= 0


def compiling() -> bool:
    """Whether torch.compile traces; its programs run here, so they may call kernels that have a fake implementation."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether any of these inputs needs a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
