"""A safetensors file by plain reads. What was read stays as it was checked, whatever happens to the file meanwhile; behind a
memory map it would change, and a file that is cut would end the process."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from sparsify.errors import BadFile, one_line
from sparsify.models import filetype

MOST_HEADER = 16 << 20  # bytes
DTYPES = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
DTYPES |= {"I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


class Entry(NamedTuple):
    """One tensor in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


class TensorFile(NamedTuple):
    """An open file: its metadata, and its tensors by name."""

    file: IO[bytes]
    metadata: dict[str, str]
    entries: dict[str, Entry]

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Fills a contiguous tensor on the CPU, of the entry's dtype and shape; `OSError`: the file has become shorter."""
        self.file.seek(self.entries[name].start)
        rest = memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while rest:
            count = self.file.readinto(rest)  # type: ignore[attr-defined]
            if not count:
                raise OSError("it became shorter while it was read")
            rest = rest[count:]


@contextmanager
def reading(path: Path) -> Iterator[TensorFile]:
    """The open file at `path`; `BadFile`: missing, no file, or not a whole safetensors file, also when it changes inside."""
    if not os.path.exists(path):
        raise BadFile(f"no file {path}: 'sparsify convert NAME' writes one")
    if not os.path.isfile(path):
        raise BadFile(f"{path} is a folder or a device: give a .safetensors file that 'sparsify convert' wrote")
    if filetype.of(path) == filetype.TORCH:
        instead = f"run 'sparsify convert NAME --weights {path}'"
        raise BadFile(f"{path} is a PyTorch checkpoint, not a converted model: {instead}")
    try:
        with open(path, "rb", buffering=0) as file:
            yield TensorFile(file, *_header(file, os.fstat(file.fileno()).st_size))
    except (OSError, _NotWhole) as error:
        raise BadFile(f"{path} is not a whole safetensors file ({one_line(error)}): convert again") from None


class _NotWhole(ValueError):
    """The layout is not that of safetensors."""


def _header(file: IO[bytes], size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and tensors: without gaps, up to the end of the file."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MOST_HEADER):
        raise _NotWhole("the length of its header is impossible")
    try:
        tree = json.loads(file.read(length))
        metadata = tree.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError
        found = sorted(((*_entry(name, about), name) for name, about in tree.items()), key=lambda each: each[:2])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _NotWhole("its header cannot be read") from None
    end, entries = 0, {}
    for start, stop, dtype, shape, name in found:
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise _NotWhole("its tensors do not lie one after the other")
        entries[name], end = Entry(dtype, shape, 8 + length + start), stop
    if 8 + length + end != size:
        raise _NotWhole(f"{8 + length + end} bytes are expected, {size} are there")
    return metadata, entries


def _entry(name: str, about: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """Start and end among the tensors' bytes, dtype and shape."""
    start, end = about["data_offsets"]
    shape = tuple(about["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError
    return start, end, DTYPES[about["dtype"]], shape
