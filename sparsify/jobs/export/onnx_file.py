"""Programs as ONNX, by torch's exporter; the metadata are the file's `metadata_props`.

Ties: ONNX's TopK gives equal values by the lower index, ascending and descending, which is what a stable sort does. The
selection of keys does not rest on it (`reference.top_b`), the choice of tokens does.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.jobs.export.metadata import INPUT

MOST_BYTES = 2_000_000_000  # of a protobuf file, a little below the 2 GiB that it can hold
UNCHECKED = "not checked: onnxruntime is not installed (pip install 'sparsify-vit[export]')"


def check() -> None:
    """Raise unless ONNX files can be written here.

    Raises:
        SparsifyError: a package is missing.
    """
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise SparsifyError(f"--format onnx needs {name}: pip install 'sparsify-vit[export]'") from None


def check_size(nbytes: int) -> None:
    """Raise where the weights do not fit into one ONNX file.

    Raises:
        SparsifyError: they do not.
    """
    if nbytes > MOST_BYTES:
        raise SparsifyError(f"weights of {nbytes / 1e9:.1f} GB: an ONNX file holds 2 GB; --format pt2 holds any number")


def write(program: torch.export.ExportedProgram, path: str, described: Mapping[str, str], output: str) -> None:
    """The program with all its weights, into `path`; its answer is called `output`."""
    dynamic = any(isinstance(size, torch.SymInt) for size in _images(program).shape)
    with _quiet():
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


def runner(path: str) -> Callable[[Tensor], Tensor] | None:
    """The program of a file: images [B, C, H, W] -> answers; None where onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _images(program: torch.export.ExportedProgram) -> Tensor:
    (name,) = program.graph_signature.user_inputs
    return next(node.meta["val"] for node in program.graph.nodes if node.name == name)


def _stable_sort() -> Callable[..., Any]:
    """`aten.sort.stable`, for which torch's exporter has no translation."""
    op: Any = importlib.import_module("onnxscript").opset18

    def sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        count = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]), axis=0)
        return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)

    return sort


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's and onnxscript's remarks on their own affairs stay unsaid; errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
