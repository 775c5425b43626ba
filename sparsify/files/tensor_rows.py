"""A safetensors file of one tensor whose rows are written as they are computed, so that memory holds a few of them only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from sparsify.errors import BadFile, SparsifyError, field
from sparsify.files import tensors
from sparsify.files.outputs import whole
from sparsify.files.plain_json import to_json

LONGEST = 100_000_000  # bytes of a header that safetensors reads
NAMES = {dtype: name for name, dtype in tensors.DTYPES.items()}


class TensorRows:
    """Takes the rows of tensor `name`; `names` of the rows, a JSON list, go into the metadata.

    Args:
        possible: names of all rows that may come, in their order; some may not come.
    """

    def __init__(self, file: IO[bytes], name: str, metadata: Mapping[str, str], possible: Sequence[str]) -> None:
        self.file, self.name, self.metadata, self.possible = file, name, metadata, possible
        self.names: list[str] = []
        self.dtype, self.row = torch.float32, tuple[int, ...]()
        self.start = 0  # of the data, in bytes: the header of all possible rows has room before

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows so far."""
        return len(self.names), *self.row

    def add(self, names: Sequence[str], rows: Tensor) -> None:
        """The next rows [b, ...], on the CPU, of one shape and dtype in all calls."""
        if not self.start:
            self.dtype, self.row = rows.dtype, tuple(rows.shape[1:])
            size = len(self._header(self.possible))
            if size > LONGEST:
                many = f"{len(self.possible):,} images have names of {size:,} bytes"
                raise SparsifyError(f"{many}, more than a safetensors file takes: set {field('limit')}")
            self.start = 8 + (size + 7) // 8 * 8
            self.file.seek(self.start)
        assert (rows.dtype, rows.shape[1:]) == (self.dtype, self.row) and len(rows) == len(names)
        self.file.write(memoryview(rows.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        self.names += names

    def finish(self) -> None:
        """Writes the header; there must be rows."""
        header = self._header(self.names).ljust(self.start - 8)
        self.file.seek(0)
        self.file.write(len(header).to_bytes(8, "little") + header)

    def _header(self, names: Sequence[str]) -> bytes:
        size = self.dtype.itemsize * torch.Size((len(names), *self.row)).numel()
        about = {"dtype": NAMES[self.dtype], "shape": [len(names), *self.row], "data_offsets": [0, size]}
        metadata = {**self.metadata, "names": to_json(list(names))}
        return to_json({"__metadata__": metadata, self.name: about}).encode("ascii")


@contextmanager
def tensor_rows(path: Path, name: str, metadata: Mapping[str, str], possible: Sequence[str]) -> Iterator[TensorRows]:
    """Takes rows; the file appears whole when the block ends without error (`sparsify.files.outputs.whole`)."""
    with whole(path) as temporary, open(temporary, "wb") as file:
        rows = TensorRows(file, name, metadata, possible)
        yield rows
        rows.finish()


def check_replaceable(path: Path, key: str) -> None:
    """Raise `BadFile` where a file lies at `path` that is no safetensors file with `key` in its metadata."""
    if not path.is_file():
        return
    try:
        with tensors.opened(path) as file:
            known = key in file.metadata
    except (OSError, tensors.NotWhole):
        known = False
    if not known:
        raise BadFile(f"{path} exists and is not a features file: choose another {field('output')}")
