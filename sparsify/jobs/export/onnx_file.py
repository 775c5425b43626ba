"""Programs as ONNX, by torch's exporter; the metadata are the file's `metadata_props`.

Ties: ONNX's TopK orders equal values by the lower index, ascending and descending, as a stable sort does. The selection of
keys does not depend on that (`ops.selection.top_b`), the choice of tokens does.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsify import extras
from sparsify.errors import SparsifyError, field

SUFFIX = ".onnx"
COMPARES = False  # tokens are chosen faster by comparisons than by sorts (`sparsify.nn.tokens_compared`)
INPUT = "images"  # name of the program's input
MOST_BYTES = 2_000_000_000  # a little below the 2 GiB that a protobuf file can hold
UNCHECKED = f"not checked: onnxruntime is not installed ({extras.advice('onnxruntime')})"


def check_packages() -> None:
    """Raise `SparsifyError` if a package is missing that writes ONNX files."""
    extras.need(f"{field('format')} onnx", "onnx", "onnxscript")


def check_size(nbytes: int) -> None:
    """Raise `SparsifyError` if weights of that size do not fit into one ONNX file."""
    if nbytes > MOST_BYTES:
        size, other = f"{nbytes / 1e9:.1f} GB", f"{field('format')} pt2"
        raise SparsifyError(f"weights of {size}: an ONNX file holds 2 GB; {other} holds any number")


def beside(path: str) -> tuple[str, ...]:
    """No further file: one holds all."""
    return ()


def write(program: torch.export.ExportedProgram, path: str, described: Mapping[str, str], output: str) -> None:
    """Writes the program with all its weights to `path`; `output`: name of its result."""
    (name,) = program.graph_signature.user_inputs
    images = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    dynamic = any(isinstance(size, torch.SymInt) for size in images.shape)
    with quiet():
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[output],
            dynamic_shapes={"x": {0: "batch"}} if dynamic else None,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
        )
    made.model.metadata_props.update(described)
    made.save(path, external_data=False)


def check_int8() -> None:
    """Raise `SparsifyError` if the package is missing that rounds weights."""
    extras.need(field("int8"), "onnxruntime")


def in_int8(path: str) -> None:
    """Rounds the weights of the linear layers of a program to int8, by output channel; the program rounds their inputs."""
    onnx, quantization = (importlib.import_module(name) for name in ("onnx", "onnxruntime.quantization"))
    described, model = metadata(path), onnx.load(path)
    columns = {each.name for each in model.graph.initializer if each.dims and each.dims[-1] == 1}
    single = [node.name for node in model.graph.node if columns & {*node.input}]  # importance
    with quiet():
        quantization.quantize_dynamic(
            path,
            path + SUFFIX,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=single,
            extra_options={"MatMulConstBOnly": True},
        )
    model = onnx.load(path + SUFFIX)
    onnx.helper.set_model_props(model, described)
    onnx.save(model, path)
    os.remove(path + SUFFIX)


def runner(path: str) -> Callable[[Tensor], Tensor] | None:
    """The program of a file: images [B, C, H, W] -> outputs; None if onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # threads that go on spinning after a run slow down whatever is timed next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def metadata(path: str) -> dict[str, str]:
    """What `write` was given as `described`."""
    onnx: Any = importlib.import_module("onnx")
    return {each.key: each.value for each in onnx.load(path, load_external_data=False).metadata_props}


def _stable_sort() -> Callable[..., Any]:
    """`aten.sort.stable`, for which torch's exporter has no translation."""
    op: Any = importlib.import_module("onnxscript").opset18

    def sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        count = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]), axis=0)
        return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)

    return sort


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the warnings and log lines of torch's exporter, compiler and onnxscript; errors are raised as ever."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
