"""A safetensors file by plain reads, whatever its path. What was read stays as it was checked, whatever happens to the file
meanwhile; behind a memory map it would change, and a file that is cut would end the process. The library's own reader takes
paths in UTF-8 only."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from sparsify.files.plain_json import from_json

MOST_HEADER = 16 << 20  # bytes
DTYPES = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
DTYPES |= {"I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
DTYPES |= {"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


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

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU; errors as of `read_into`."""
        tensor = torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype)
        self.read_into(name, tensor)
        return tensor


class NotWhole(ValueError):
    """The layout is not that of safetensors."""


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """The safetensors file at `path`; raises `OSError` where it cannot be read, and `NotWhole`."""
    with open(path, "rb", buffering=0) as file:
        yield TensorFile(file, *_header(file, os.fstat(file.fileno()).st_size))


def _header(file: IO[bytes], size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and tensors: without gaps, up to the end of the file."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MOST_HEADER):
        raise NotWhole("the length of its header is impossible")
    try:
        tree = from_json(file.read(length))
        metadata = tree.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError
        found = sorted(((*_entry(name, about), name) for name, about in tree.items()), key=lambda each: each[:2])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise NotWhole("its header cannot be read") from None
    end, entries = 0, {}
    for start, stop, dtype, shape, name in found:
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise NotWhole("its tensors do not lie one after the other")
        entries[name], end = Entry(dtype, shape, 8 + length + start), stop
    if 8 + length + end != size:
        raise NotWhole(f"{8 + length + end} bytes are expected, {size} are there")
    return metadata, entries


def _entry(name: str, about: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """Start and end among the tensors' bytes, dtype and shape."""
    start, end = about["data_offsets"]
    shape = tuple(about["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError
    return start, end, DTYPES[about["dtype"]], shape
