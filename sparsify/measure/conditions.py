"""Under which circumstances figures were measured, for the files that hold them."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import timm
import torch

from sparsify import processes
from sparsify.ops.devices import device_name, gpu_details
from sparsify.processes import Compute
from sparsify.version import __version__

EVALUATION = (
    "data limit seed budget batch_size dtype device device_name threads processes backend torch timm sparsify python"
).split()
PROFILE = "batch_size dtype device device_name threads runs torch timm sparsify".split()
AGAINST = "batch_size img_size dtype device device_name threads runs backend torch timm sparsify".split()
SWEEP = "batch_size img_size dtype device device_name threads runs backend platform python torch timm sparsify".split()
"""Keys of the results of `eval`, `profile`, `profile --against` and `sweep`."""


def conditions(keys: Iterable[str], compute: Compute, **known: Any) -> dict[str, Any]:
    """The conditions of a measurement on this machine under `keys`, in their order; fit for JSON. On a GPU also
    "device_details": its capability, versions and clocks in one line.

    known: values that neither `compute` nor this machine tells (data, img_size, runs, backend), or that differ from theirs.
    """
    device = compute.torch_device
    told = {
        "batch_size": compute.batch_size,
        "dtype": compute.dtype,
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": processes.world(),
        "backend": compute.backend,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "sparsify": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    } | known
    details = gpu_details(device)
    return {key: told[key] for key in keys} | ({"device_details": details} if details else {})
