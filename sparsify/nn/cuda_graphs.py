"""A model whose forward pass is replayed from CUDA graphs, one for each shape of its input.

An eager forward pass launches hundreds of kernels, and at small batches a GPU waits for Python to launch them. A graph
launches all of them at once. It reads its input from one buffer and works in memory of its own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyError, UsageError, field, one_line
from sparsify.nn import graft, schedules
from sparsify.nn.guard import Guard
from sparsify.ops import auto, timing

MOST = 16  # graphs kept, the last used ones: each has memory for all activations


class Key(NamedTuple):
    """What a graph was captured for."""

    size: torch.Size
    dtype: torch.dtype
    budget: float | None
    autocast: torch.dtype | None


class Recorded(NamedTuple):
    """A captured forward pass."""

    graph: Any  # torch.cuda.CUDAGraph
    images: Tensor  # its input
    outputs: Tensor  # its output, overwritten by every replay
    dense: bool  # of the dense model, which was faster
    modules: tuple[nn.Module, ...] = ()  # of the model as it was then


class Graphed(nn.Module):
    """A model in eval mode whose calls are replays of CUDA graphs, captured at the first call of each shape.

    Args:
        model: on a CUDA device; one tensor in, one tensor out.
        dense_allowed: the dense model, with all tokens, may stand in for a shape where its graph is measured faster.

    A call is computed eagerly, by `module` itself, where a gradient may be needed, where modules have hooks, under a
    compiler or tracer, and for anything but one image tensor on the device. Other attributes and methods are those of
    `module`, among them `forward_features`, which is not replayed. Weights may be changed in place.

    Raises:
        UsageError: a model that is not on a CUDA device; `train()`.
        SparsifyError: at the first call, a model that cannot be captured.
    """

    def __init__(self, model: nn.Module, dense_allowed: bool = False) -> None:
        super().__init__()
        self.module, self.dense_allowed = model.eval(), dense_allowed
        self.training = False
        check(self.device)
        self._graphs: OrderedDict[Key, Recorded] = OrderedDict()
        self._lock = threading.Lock()
        self._done = torch.cuda.Event()  # of the last replay: another thread may have another stream

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.module.parameters()).device

    @property
    def graphs(self) -> dict[tuple[int, ...], str]:
        """'sparse' or 'dense' by the shape of the input, of every graph that is kept."""
        return {tuple(key.size): "dense" if found.dense else "sparse" for key, found in self._graphs.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Images [B, C, H, W] -> what `module` gives; a tensor of its own, which later calls leave as it is."""
        if len(args) != 1 or kwargs or not self._replayable(args[0]):
            return self.module(*args, **kwargs)
        x = cast(Tensor, args[0])
        with self._lock, torch.cuda.device(x.device):
            key = self._key(x)
            found = self._graphs.get(key)
            modules = tuple(self.module.modules()) if found is None else found.modules
            if any(map(_has_hooks, modules)):
                return self.module(x)
            if found is None:
                found = self._graphs[key] = self._recorded(x)._replace(modules=modules)
                while len(self._graphs) > MOST:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            torch.cuda.current_stream().wait_event(self._done)
            with torch.inference_mode():  # its tensors were made in it
                found.images.copy_(x)
                found.graph.replay()
            outputs = found.outputs.clone()
            self._done.record()
            return outputs

    def _replayable(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or x.device != self.device or torch.compiler.is_compiling():
            return False
        if type(x) not in (Tensor, nn.Parameter) or torch.jit.is_tracing():
            return False
        if not torch.is_grad_enabled():
            return True
        return not (x.requires_grad or any(p.requires_grad for p in self.module.parameters()))

    def _key(self, x: Tensor) -> Key:
        several = schedules.offered(self.module)
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return Key(x.shape, x.dtype, None if several is None else several.budget, autocast)

    @torch.inference_mode()
    def _recorded(self, x: Tensor) -> Recorded:
        """The graph of a shape: the sparse model's, or the dense one's if that may stand in and is faster."""
        sparse = record(self.module, x)
        if not self.dense_allowed:
            return sparse
        dense = record(graft.dense_twin(self.module), x)._replace(dense=True)
        ms = auto.race(
            {"sparse": sparse.graph.replay, "dense": dense.graph.replay},
            watch=lambda replay: timing.stopwatch(replay, x.device),
        ).ms
        return dense if ms["sparse"] > auto.SLOWER * ms["dense"] else sparse

    def train(self, mode: bool = True) -> Graphed:
        """Refused for True: graphs hold a forward pass without gradients."""
        if mode:
            raise UsageError(f"a model loaded with {field('graph')} is for inference: load it without to train it")
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Graphed:
        self._graphs.clear()  # of tensors that may be replaced now
        super()._apply(*args, **kwargs)
        check(self.device)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphed:
        raise TypeError("a model with CUDA graphs is not copied: copy its `module`")

    def __reduce__(self) -> Any:
        raise TypeError("a model with CUDA graphs is not pickled: pickle its `module`")


def plain(model: nn.Module) -> nn.Module:
    """The model without its graphs."""
    return model.module if isinstance(model, Graphed) else model


def check(device: torch.device) -> None:
    """Raise `UsageError` where there are no CUDA graphs."""
    if device.type != "cuda":
        raise UsageError(f"{field('graph')}: CUDA graphs need {field('device')} cuda, not {device}")


def record(model: nn.Module, x: Tensor) -> Recorded:
    """Captures model(x), which may not wait for the device; kernels are chosen and compiled in calls before."""
    images = x.clone()
    timing.warm_up(lambda: model(images))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = model(images)
    except RuntimeError as error:  # it waits for the device, or copies from the CPU
        reason = f"this model cannot be captured in a CUDA graph ({one_line(error)})"
        raise SparsifyError(f"{field('graph')}: {reason}: load it without") from error
    if not isinstance(outputs, Tensor):
        raise UsageError(f"{field('graph')}: this model gives {type(outputs).__name__}, not one tensor")
    return Recorded(graph, images, outputs, False)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of the user's, which a replay would not call."""
    if module._forward_hooks or module._backward_hooks:
        return True
    return any(not isinstance(hook, Guard) for hook in module._forward_pre_hooks.values())
