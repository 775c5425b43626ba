"""What `auto.py` measured, on disk: one JSON file for each machine and set of versions.

    cache_dir()/auto/<hash>.json      {"machine": what the hash is of, "choices": {shape: choice}}

Nothing here raises: if a file is missing, damaged or cannot be written, shapes are measured again. The folder can be deleted
at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import BadFile
from sparsify.files.outputs import write_json
from sparsify.files.plain_json import from_json
from sparsify.ops import backends
from sparsify.ops.cpu import build, kernels
from sparsify.ops.devices import device_name, gpu_versions
from sparsify.version import __version__

LARGEST = 1_000_000  # bytes: about 3,000 shapes


def identity(device: str) -> dict[str, str]:
    """What a measurement depends on, shape and threads apart: processor, instruction set, versions, kernels.

    Of a GPU also compute capability and Triton's version. device: of torch, cuda:1 for example.
    """
    usable = device == "cpu" and backends.not_built() is None
    library = build.build().path if usable else None
    return {
        "device": device_name(torch.device(device)),
        "isa": kernels.isa() if usable else "",
        "kernels": library.parent.name if library else "",  # hash of sources, flags and compiler
        "torch": torch.__version__,
        "sparsify": __version__,
    } | gpu_versions(torch.device(device))


def file_of(machine: dict[str, str]) -> Path | None:
    """The file of one machine; None without a cache folder."""
    try:
        folder = build.cache_dir() / "auto"
    except RuntimeError:
        return None
    return folder / f"{hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]}.json"


def read(path: Path | None) -> dict[str, Any]:
    """Shape -> choice, as written; empty where the file is no regular one of at most `LARGEST` bytes, or damaged."""
    try:
        if path is None or not path.is_file() or path.stat().st_size > LARGEST:
            return {}
        choices = from_json(path.read_text(encoding="utf-8"))["choices"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return choices if isinstance(choices, dict) else {}


def add(path: Path | None, machine: dict[str, str], shape: str, choice: dict[str, Any]) -> None:
    """Put one choice into the file, which is replaced whole; what other processes wrote meanwhile stays."""
    if path is None:
        return
    with contextlib.suppress(OSError, BadFile):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a pipe would be waited for
            path.unlink()
        write_json(path, {"machine": machine, "choices": read(path) | {shape: choice}})
