"""Under which circumstances figures were measured."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import timm
import torch

from sparsify import processes
from sparsify.ops import backends
from sparsify.ops.backends import device_name
from sparsify.version import __version__


def conditions(
    images: str, batch_size: int, dtype: torch.dtype, device: str, backend: str, kernel_precision: str
) -> dict[str, Any]:
    """Under which circumstances figures were measured here, JSON-able."""
    place = torch.device(device)
    return {
        "data": images, "batch_size": batch_size, "dtype": str(dtype).removeprefix("torch."), "device": str(place),
        "device_name": device_name(place), "threads": torch.get_num_threads(), "processes": processes.world(),
        "backend": backends.describe(backend, kernel_precision, place, dtype), "torch": torch.__version__,
        "timm": timm.__version__, "sparsify": __version__, "python": platform.python_version(),
    }  # fmt: skip


def _conditions(images: torch.Tensor, dtype: str, runs: int) -> dict[str, Any]:
    try:
        version = metadata.version("sparsify-vit")
    except metadata.PackageNotFoundError:  # a checkout on the path
        version = "unknown"
    return {
        "batch_size": images.shape[0],
        "dtype": dtype,
        "device": str(images.device),
        "device_name": device_name(images.device),
        "threads": torch.get_num_threads(),
        "runs": runs,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "sparsify": version,
    }
