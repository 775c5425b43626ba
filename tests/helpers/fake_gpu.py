"""A GPU that is not there: tensors that say they lie on one, and stand-ins of `torch.cuda` with a clock of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsify.ops import backends
from sparsify.ops.gpu import available, launching


class OnlyThere(TorchDispatchMode):
    """Fails where an op makes or reads a tensor of the CPU's: a copy that waits for the GPU, or the wrong device.

    A tensor of the CPU without dimensions is a number to the GPU's kernels, which optimisers count steps with; only a copy
    of it fails.
    """

    COPIES = ("_to_copy", "copy_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.device.type == "cpu"]
        copied = any(f".{name}." in f".{func}" for name in self.COPIES)
        if found and func is not torch.ops.prim.device.default and (copied or any(t.ndim for t in found)):
            raise AssertionError(f"{func} with {[(tuple(t.shape), t.dtype) for t in found]} on the CPU")
        return out


class NoNumbers:
    """Stands in for `torch.Generator`, which needs a device that is there."""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = device

    def manual_seed(self, seed: int) -> None:
        """None: torch's own generator."""


@contextlib.contextmanager
def fake_gpu(
    patch: pytest.MonkeyPatch, *models: nn.Module, device: str = "cuda", triton: bool = True
) -> Iterator[None]:
    """Inside, tensors made on `device` have no values: to look at one raises, as it would wait on a GPU. Those of the CPU
    fail. The package takes its eager paths, as for real tensors.

    models: put on the GPU, in place.
    triton: whether it is installed.
    device: cuda; meta for backward passes, which without a driver cannot be on cuda.
    """
    patch.setattr(backends, "eager", lambda q: True)
    patch.setattr(torch, "Generator", NoNumbers)
    patch.setattr(available, "capability", lambda index: (9, 0))
    patch.setattr(available, "has_triton", lambda: triton)
    patch.setattr(launching.Op, "__call__", lambda op, *call: op.library(*call))  # nothing is launched
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *how: True)
    if device == "meta":
        patch.setattr(torch, "autocast", lambda *how, **more: contextlib.nullcontext())  # there is none
    with FakeTensorMode(allow_non_fake_inputs=True) if device == "cuda" else contextlib.nullcontext():
        for model in models:
            _put(model, device)
        with OnlyThere():
            yield


def _put(model: nn.Module, device: str) -> None:
    """Parameters and buffers anew on the GPU, shared ones shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None and id(t) not in made:
                    new = torch.empty(t.shape, dtype=t.dtype, device=device)
                    made[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
                tensors[name] = t if t is None else made[id(t)]  # type: ignore[assignment]


class PretendedCuda:
    """Stands in for events, streams and graphs of `torch.cuda`. `now`: milliseconds, which calls add to.

    A graph remembers the call that was captured and makes it again at each replay, as a GPU does with its kernels.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.capturing, self.replays, self.captured = 0.0, False, 0, 0
        self.waited: list[Any] = []  # events that streams were told to wait for
        world = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = world.now

            def synchronize(self) -> None:
                assert not world.capturing

            def elapsed_time(self, other: Any) -> float:
                return other.at - self.at

        class Graph:
            def replay(self) -> None:
                assert not world.capturing
                world.replays += 1
                world.now += 0.01

        @contextlib.contextmanager
        def graph(made: Graph, **how: Any) -> Iterator[None]:
            world.capturing, world.captured = True, world.captured + 1
            before = world.now
            yield
            took = world.now - before
            world.now, world.capturing = before, False

            def replay() -> None:
                Graph.replay(made)
                world.now += took

            made.replay = replay  # type: ignore[method-assign]

        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

            def wait_event(self, event: Any) -> None:
                world.waited.append(event)

        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": Stream, "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext(),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
