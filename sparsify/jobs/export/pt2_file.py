"""Programs of `torch.export` in one file (.pt2); the metadata are its extra files, one for each key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO

import torch
from torch import Tensor

SUFFIX = ".pt2"
COMPARES = False  # tokens are chosen faster by comparisons than by sorts (`sparsify.nn.tokens_compared`)
UNCHECKED = ""  # torch runs it


def check_packages() -> None:
    """Nothing: only torch is needed."""


def check_size(nbytes: int) -> None:
    """Nothing: any size fits."""


def beside(path: str) -> tuple[str, ...]:
    """No further file: one holds all."""
    return ()


def write(program: torch.export.ExportedProgram, path: str, described: Mapping[str, str], output: str) -> None:
    """Writes the program with all its weights to `path`; outputs have no names there."""
    content = BytesIO()  # torch's own writer of files ends the process where the disk is full
    torch.export.save(program, content, extra_files=dict(described))
    with open(path, "wb") as file:
        file.write(content.getbuffer())


def metadata(path: str) -> dict[str, str]:
    """What `write` was given as `described`."""
    found = {"sparsify.export": ""}  # any one name: all of them are filled in
    with open(path, "rb") as file:
        torch.export.load(file, extra_files=found)
    return {key: text.decode() if isinstance(text, bytes) else text for key, text in found.items()}


def runner(path: str) -> Callable[[Tensor], Tensor]:
    """The program of a file: images [B, C, H, W] -> outputs."""
    with open(path, "rb") as file:
        return torch.export.load(file).module()
