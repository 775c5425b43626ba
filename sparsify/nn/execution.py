"""How the attention of a model is computed: one setting for all its grafted modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsify.errors import UsageError
from sparsify.nn import hosts
from sparsify.nn.attention import (
    Execution,
    attention_modules,
)
from sparsify.ops import backends

if TYPE_CHECKING:
    pass


def set_execution(model: nn.Module, execution: Execution) -> None:
    """How all sparse attention of `model` is computed, in place; the device and dtype of its weights are looked at.

    Raises:
        UsageError: an unknown backend or precision; backend cpu where the kernels cannot be used.
    """
    weight = next(model.parameters())
    check_execution(execution, weight.device, weight.dtype, hosts.biased(model))
    for module in attention_modules(model).values():
        module.execution = execution


def check_execution(execution: Execution, device: torch.device, dtype: torch.dtype, biased: bool = False) -> None:
    """Raise as `set_execution` does, for a model that would be there; change nothing."""
    for what, given, known in (
        ("backend", execution.backend, backends.BACKENDS),
        ("kernel precision", execution.precision, backends.PRECISIONS),
    ):
        if given not in known:
            raise UsageError(f"{what} '{given}': expected one of {', '.join(known)}")
    if execution.backend == "cpu" and (reason := backends.unavailable(device, dtype, biased)):
        raise UsageError(f"backend 'cpu' cannot be used here: {reason}; 'auto' or 'reference' needs no kernels")


@contextlib.contextmanager
def sparse_form(model: nn.Module, backend: str | None = None, precision: str | None = None) -> Iterator[None]:
    """Inside the block all attention computes the sparse form: no dense fallback. Afterwards all is as it was.

    Args:
        backend, precision: of `Execution`; None: the model's own.

    Raises:
        UsageError: see `set_execution`.
    """
    modules = list(attention_modules(model).values())
    before = [module.execution for module in modules]
    try:
        for module, own in zip(modules, before, strict=True):
            sparse = Execution(own.backend if backend is None else backend, precision or own.precision)
            set_execution(module, sparse)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.execution = own
