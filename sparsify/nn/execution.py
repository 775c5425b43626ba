"""How the attention of a model is computed: one setting for all its grafted modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from sparsify.errors import UsageError
from sparsify.nn import hosts
from sparsify.nn.attention import Execution, attention_modules
from sparsify.ops import backends


def set_execution(model: nn.Module, execution: Execution) -> None:
    """Set how all grafted attention of `model` is computed, in place.

    Raises:
        UsageError: an unknown backend or precision; backend cpu where the kernels cannot compute on the device or in the
            dtype of the model's weights.
    """
    weight = next(model.parameters())
    check_execution(execution, weight.device, weight.dtype, hosts.biased(model))
    for module in attention_modules(model).values():
        module.execution = execution


def check_execution(execution: Execution, device: torch.device, dtype: torch.dtype, biased: bool = False) -> None:
    """Raise as `set_execution` would for a model of this device and dtype; biased: see `hosts.biased`."""
    for what, value, known in (
        ("backend", execution.backend, backends.BACKENDS),
        ("kernel precision", execution.precision, backends.PRECISIONS),
    ):
        if value not in known:
            raise UsageError(f"{what} '{value}': expected one of {', '.join(known)}")
    if execution.backend == "cpu" and (reason := backends.unavailable(device, dtype, biased)):
        raise UsageError(f"backend 'cpu' cannot be used here: {reason}; 'auto' or 'reference' needs no kernels")


@contextlib.contextmanager
def sparse_form(model: nn.Module, backend: str | None = None, precision: str | None = None) -> Iterator[None]:
    """Inside the context all attention computes the sparse form, without dense fallback; restored afterwards.

    Args:
        backend, precision: of `Execution`; None: the model's own.

    Raises:
        UsageError: see `set_execution`.
    """
    before = {module: module.execution for module in attention_modules(model).values()}
    try:
        for module, e in before.items():
            set_execution(module, Execution(e.backend if backend is None else backend, precision or e.precision))
        yield
    finally:
        for module, e in before.items():
            module.execution = e
