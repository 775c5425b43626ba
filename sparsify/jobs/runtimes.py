"""What runs a model: PyTorch eager and compiled, and the runtimes of exported programs.

Each is an entry of `RUNTIMES`; another runtime of programs is one more `Program`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import extras
from sparsify.errors import SparsifyError
from sparsify.jobs.export import onnx_file, openvino_file, program
from sparsify.measure import macs
from sparsify.nn import guard
from sparsify.processes import DTYPES, Compute

Run = Callable[[], Any]  # one forward pass of the batch that it was made for


@dataclass(frozen=True)
class Request:
    """The batch to run and how to compute it."""

    images: Tensor  # [B, C, H, W], float32, on the CPU
    compute: Compute
    backbone_changed: bool  # its weights fit sparse attention alone: no dense attention stands in
    folder: Path  # for programs; it must be there as long as they run

    def batch(self) -> Tensor:
        """The images on the device and in the dtype of `compute`."""
        return self.images.to(self.compute.torch_device, self.compute.torch_dtype)


@dataclass(frozen=True)
class Runtime:
    """Runs models on this machine. `packages`: what it needs besides torch."""

    name: str
    dtypes: tuple[str, ...] = DTYPES
    packages: tuple[str, ...] = ()
    int8: bool = False  # linear layers compute in int8: to be held against bfloat16, not float32

    def forms(self, model: nn.Module, backbone_changed: bool) -> dict[str, nn.Module]:
        """What may be run for `model`, of which the fastest stands for it, by its attention where there is a choice."""
        return {"": model}

    def check(self, compute: Compute) -> None:
        """Raise `SparsifyError` where it lacks a package, or cannot compute on the device or in the dtype."""
        for package in extras.missing(*self.packages):
            raise SparsifyError(f"{package} is not installed: {extras.advice(package)}")
        if compute.dtype not in self.dtypes:
            raise SparsifyError(f"{self.name} computes {' or '.join(self.dtypes)} only, not {compute.dtype}")

    def prepare(self, model: nn.Module, name: str, request: Request) -> Run:
        """The model, sparse or dense, ready to run; it is left as it is. `name`: of its program's file."""
        raise NotImplementedError


class Eager(Runtime):
    """PyTorch as `sparsify.load` gives a model."""

    def prepare(self, model: nn.Module, name: str, request: Request) -> Run:
        """See `Runtime.prepare`."""
        return partial(_loaded(model, request), request.batch())


class Compiled(Runtime):
    """The same under torch.compile, in one graph and with frozen weights."""

    def prepare(self, model: nn.Module, name: str, request: Request) -> Run:
        """See `Runtime.prepare`."""
        from torch._inductor import config

        run = partial(torch.compile(_loaded(model, request), fullgraph=True), request.batch())
        with torch.inference_mode(), config.patch(freezing=True), onnx_file.quiet():
            run()  # compiles
        return run


@dataclass(frozen=True)
class Program(Runtime):
    """A runtime of programs that `sparsify export` writes; it computes on the CPU."""

    writer: Any = None  # a module such as `sparsify.jobs.export.onnx_file`
    precise: bool = False  # whether the writer's `runner` takes a precision

    def forms(self, model: nn.Module, backbone_changed: bool) -> dict[str, nn.Module]:
        """The programs of which `sparsify export` by default writes the faster."""
        kinds = program.candidates(model, backbone_changed)
        return {kind if len(kinds) > 1 else "": program.attending(model, kind) for kind in kinds}

    def check(self, compute: Compute) -> None:
        """See `Runtime.check`."""
        super().check(compute)
        if compute.torch_device.type != "cpu":
            raise SparsifyError(f"{self.name} computes on the CPU only here, not on {compute.device}")

    def prepare(self, model: nn.Module, name: str, request: Request) -> Run:
        """See `Runtime.prepare`."""
        mine = macs.replica(model, torch.device("cpu"), torch.float32)
        self.writer.check_size(sum(t.nbytes for t in mine.state_dict().values()))
        path, images = str(request.folder / f"{name}{self.writer.SUFFIX}"), request.images
        traced = program.trace(mine, len(images), self.writer.COMPARES)
        self.writer.write(traced, path, {}, program.output_name(mine))
        if self.int8:
            self.writer.in_int8(path)
        precision = {"precision": request.compute.dtype} if self.precise else {}
        return partial(self.writer.runner(path, **precision), images)


def _loaded(model: nn.Module, request: Request) -> nn.Module:
    """A copy as `sparsify.load` gives it, on the device and in the dtype of the request."""
    compute = request.compute
    mine = macs.replica(model, compute.torch_device, compute.torch_dtype)
    guard.set_backend(mine, compute.backend, compute.kernel_precision, dense_allowed=not request.backbone_changed)
    return mine


_ONNX = ("onnx", "onnxscript", "onnxruntime")
_BOTH = ("float32", "bfloat16")
RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Eager("eager"),
        Compiled("compile"),
        Program("onnxruntime", ("float32",), _ONNX, writer=onnx_file),
        Program("openvino", _BOTH, ("openvino",), writer=openvino_file, precise=True),
        Program("onnxruntime-int8", _BOTH, _ONNX, True, onnx_file),
        Program("openvino-int8", _BOTH, ("openvino", "nncf"), True, openvino_file, precise=True),
    )
}
