"""Programs as OpenVINO IR: NAME.xml and, with the weights, NAME.bin; the metadata are its runtime information (rt_info)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from sparsify import extras
from sparsify.errors import field
from sparsify.jobs.export.onnx_file import INPUT, quiet

SUFFIX = ".xml"
COMPARES = True  # tokens are chosen faster by comparisons than by sorts (`sparsify.nn.tokens_compared`)
UNCHECKED = f"not checked: openvino is not installed ({extras.advice('openvino')})"
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}  # in which OpenVINO computes, whatever the file holds
OWN = "sparsify"  # the section of rt_info


def check_packages() -> None:
    """Raise `SparsifyError` if the package is missing that writes and runs these files."""
    extras.need(f"{field('format')} openvino", "openvino")


def check_size(nbytes: int) -> None:
    """Nothing: any size fits."""


def beside(path: str) -> tuple[str, ...]:
    """The file of the weights of a program at `path`."""
    return (path.removesuffix(SUFFIX) + ".bin",)


def check_int8() -> None:
    """Raise `SparsifyError` if the package is missing that rounds weights."""
    extras.need(field("int8"), "nncf")


def in_int8(path: str) -> None:
    """Rounds the weights of the linear layers of a program to int8, by output channel; OpenVINO rounds their inputs."""
    (weights,) = beside(path)
    with _unreported() as ov, contextlib.redirect_stdout(io.StringIO()):  # it draws a bar
        nncf: Any = importlib.import_module("nncf")
        nncf.set_log_level(logging.ERROR)
        model = read(path)
        products = [op for op in model.get_ops() if op.get_type_name() == "MatMul"]
        single = [op.get_friendly_name() for op in products if op.get_output_partial_shape(0)[-1] == 1]  # importance
        scope = nncf.IgnoredScope(names=single, validate=False)
        made = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=scope)
        ov.serialize(made, path + SUFFIX, weights)
    os.replace(path + SUFFIX, path)


def write(program: torch.export.ExportedProgram, path: str, described: Mapping[str, str], output: str) -> None:
    """Writes the program to `path` and its weights, float32, `beside` it; `output`: name of its result."""
    (name,) = program.graph_signature.user_inputs
    images = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    with _unreported() as ov:
        model = ov.convert_model(program)
    model.inputs[0].set_names({INPUT})
    model.outputs[0].set_names({output})
    model.reshape({INPUT: [-1 if isinstance(size, torch.SymInt) else size for size in images.shape]})
    for key, text in described.items():
        model.set_rt_info(text, [OWN, key.removeprefix(f"{OWN}.")])
    (weights,) = beside(path)
    ov.serialize(model, path + SUFFIX, weights)  # it wants that ending
    os.replace(path + SUFFIX, path)


def read(path: str) -> Any:
    """The `openvino.Model` of a file."""
    (weights,) = beside(path)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    with _unreported() as ov:
        return _core().read_model(text, ov.Tensor(numpy.fromfile(weights, dtype=numpy.uint8)))


def metadata(path: str) -> dict[str, str]:
    """What `write` was given as `described`, by the same keys."""
    found = read(path).get_rt_info()
    return {f"{OWN}.{key}": str(value.value) for key, value in found[OWN].items()} if OWN in found else {}


def runner(path: str, precision: str = "float32") -> Callable[[Tensor], Tensor]:
    """The program of a file: images [B, C, H, W] float32 -> outputs; precision: one of `PRECISIONS`."""
    how = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
    }
    compiled = _core().compile_model(read(path), "CPU", how)
    return lambda images: torch.from_numpy(numpy.array(compiled([images.numpy()])[0]))


@functools.cache
def _core() -> Any:
    """The `openvino.Core` of this process, which keeps it: OpenVINO gives a thread a stack for signal handlers with each
    `Core` and takes it back with it. Of two, the one made first must not end first, or the next signal kills the process.
    """
    with _unreported() as ov:
        return ov.Core()


@contextlib.contextmanager
def _unreported() -> Iterator[Any]:
    """The package. It tells its maker of every import and conversion unless `openvino_telemetry` cannot be imported, which
    is so inside; who imported that before has chosen."""
    name = "openvino_telemetry"
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = cast(Any, None)
    try:
        with quiet():  # what it imports warns of a GPU that is not there
            yield importlib.import_module("openvino")
    finally:
        if hidden:
            del sys.modules[name]
