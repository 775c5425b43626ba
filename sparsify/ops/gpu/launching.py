"""Ops of Triton kernels, and the launch of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.ops import backends


class Op:
    """An op of torch.library, `sparsify::<name of function>`; the function itself where nothing traces: torch.library takes
    10 to 20 us for a call.

    Args:
        function: from tensors, the first no None, to new tensors.
        launches: number of kernels that a call launches.
    """

    def __init__(self, function: Callable[..., Any], launches: int) -> None:
        self.function, self.launches, self.__doc__ = function, launches, function.__doc__
        self.library = torch.library.custom_op(f"sparsify::{function.__name__}", function, mutates_args=())

    def __call__(self, first: Tensor, *others: Any) -> Any:
        return (self.function if backends.eager(first) else self.library)(first, *others)

    def fake(self, function: Callable[..., Any]) -> None:
        """Decorator: the shapes, for torch.compile and fake tensors."""
        self.library.register_fake(function)


def op(launches: int) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: an `Op`."""
    return lambda function: Op(function, launches)


def launch(kernel: Any, grid: Sequence[int], arguments: Sequence[Any], device: torch.device, **options: Any) -> None:
    """Run `kernel` on `device` with one program for each cell of `grid`.

    Args:
        options: constants of the kernel by name, num_warps and num_stages.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[tuple(grid)](*arguments, **options)


def precision(x: Tensor) -> str:
    """How `tl.dot` multiplies float32 matrices: three products in tf32 are about as exact as float32, on tensor cores."""
    return "ieee" if torch.version.hip or x.dtype != torch.float32 else "tf32x3"


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def tiles(n: int, size: int) -> int:
    """Number of tiles of `size` that hold n."""
    return -(-n // size)
