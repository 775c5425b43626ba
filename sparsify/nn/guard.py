"""Models whose attention `ops.auto` decides are never slower than with dense attention: each new call is checked once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsify.nn import schedules
from sparsify.nn.attention import Execution, attention_modules
from sparsify.nn.execution import set_execution
from sparsify.nn.graft import shared_copy
from sparsify.ops import auto, backends, timing
from sparsify.ops.auto import Choice, Chooser, Race
from sparsify.ops.candidates import Sparse
from sparsify.ops.spec import Shape


class Call(NamedTuple):
    """What decides whether a call was checked."""

    size: torch.Size
    dtype: torch.dtype
    device: str
    threads: int
    budget: float | None


class Guard:
    """A hook that runs before a model's forward pass. It measures on copies, which share the weights and have no hooks."""

    def __init__(self) -> None:
        self.checked: dict[Call, float] = {}  # until when (`time.perf_counter`)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Checks the model where such a call is new and nothing forbids dense attention."""
        if torch.compiler.is_compiling() or model.training or not args or not isinstance(args[0], Tensor):
            return
        chooser, x = _chooser(model), args[0]
        if chooser is None or chooser.withdrawn or not backends.eager(x):
            return
        offered = schedules.offered(model)
        budget = None if offered is None else offered.budget
        call = Call(x.shape, x.dtype, str(x.device), torch.get_num_threads(), budget)
        if time.perf_counter() < self.checked.get(call, -1.0):
            return
        self.checked[call] = float("inf")  # other threads go on meanwhile
        if _check(model, chooser, x.device, args, kwargs) is None:
            self.checked[call] = time.perf_counter() + auto.AGAIN_S[0]


def set_backend(
    model: nn.Module, backend: str, precision: str = "input", dense_allowed: bool = True, graph: bool = False
) -> None:
    """Sets what computes the attention of `model`, in place; where that is `auto` and dense attention is allowed, what was
    measured to be fastest.

    backend, precision, graph: of `Execution`. Raises `UsageError` as `execution.set_execution`.
    """
    measured = backend == "auto" and dense_allowed
    set_execution(model, Execution(backend, precision, measured, Chooser() if measured else None, graph))
    if measured and not any(isinstance(hook, Guard) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(Guard(), with_kwargs=True)


def _check(
    model: nn.Module, chooser: Chooser, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool | None:
    """See `Chooser.settle`."""
    decided, dense = _Asked(chooser), _Asked(chooser, dense=True)
    runs = {"decided": _copy(model, decided), "dense": _copy(model, dense)}
    with torch.inference_mode():
        runs["decided"](*args, **kwargs)
    if all(choice.taken == choice.dense for choice in decided.taken.values()):
        return False

    def race() -> Race:
        calls: dict[str, Callable[[], object]] = {name: partial(run, *args, **kwargs) for name, run in runs.items()}
        watch = partial(timing.stopwatch, device=device, graph=int(_graphed(model)))
        with torch.inference_mode():
            took = timing.stopwatch(calls["decided"], device)() / 1000
            return auto.race(calls, time.perf_counter, watch) if 2 * took <= auto.LIMIT_S else _once(calls, device)

    name = f"{type(model).__name__} of {sum(p.numel() for p in model.parameters())} parameters"
    return chooser.settle(name + (", in a graph" if _graphed(model) else ""), decided.taken, str(device), race)


def _once(calls: Mapping[str, Callable[[], object]], device: torch.device) -> Race:
    """A race of one round, for models that take seconds."""
    start, worked = time.perf_counter(), time.thread_time()
    ms = {name: timing.stopwatch(call, device)() for name, call in calls.items()}
    return Race(ms, 1, (time.thread_time() - worked) / (time.perf_counter() - start))


class _Asked(Chooser):
    """Asks another chooser, takes what it decides or always the fastest dense kernel, and notes it."""

    def __init__(self, chooser: Chooser, dense: bool = False) -> None:
        super().__init__()
        self.chooser, self.dense = chooser, dense
        self.taken: dict[Shape, Choice] = {}

    def choose(self, shape: Shape, sparse: Sparse | None) -> Choice:
        choice = self.chooser.choose(shape, sparse)
        choice = replace(choice, taken=choice.dense) if self.dense else choice
        self.taken[shape] = choice
        return choice


def _copy(model: nn.Module, chooser: Chooser) -> nn.Module:
    """The model without hooks, its attention decided by `chooser`."""
    other = shared_copy(model)
    for module in other.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for attention in attention_modules(other).values():
        if attention.execution.choose is not None:
            attention.execution = replace(attention.execution, choose=chooser)
    return other


def _graphed(model: nn.Module) -> bool:
    """Whether a model is replayed from CUDA graphs."""
    return any(module.execution.graph for module in attention_modules(model).values())


def _chooser(model: nn.Module) -> Chooser | None:
    """What decides the attention of a model."""
    for module in attention_modules(model).values():
        if module.execution.dense_fallback and module.execution.choose is not None:
            return module.execution.choose
    return None
