"""Names of processors and GPUs, and what of a GPU decides how fast it computes."""

from __future__ import annotations

import re

import torch

from sparsify.ops.cpu import processor


def device_name(device: torch.device) -> str:
    """The processor's or the accelerator's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor.name()


def gpu_versions(device: torch.device) -> dict[str, str]:
    """Compute capability and Triton's version; empty for other devices than CUDA's."""
    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return {"capability": f"{major}.{minor}", "triton": triton_version()}


def gpu_details(device: torch.device) -> str:
    """Capability, versions and clocks of a GPU in one line; '' for other devices.

    Clocks: the current one where NVIDIA's management library can be asked (package nvidia-ml-py), else the highest one that
    torch names, else none.
    """
    if device.type != "cuda":
        return ""
    found = torch.cuda.get_device_properties(device)
    parts = [f"capability {found.major}.{found.minor}", f"{found.multi_processor_count} multiprocessors"]
    parts.append(f"CUDA {torch.version.cuda or torch.version.hip}")
    if triton_version():
        parts.append(f"Triton {triton_version()}")
    if driver := _driver():
        parts.append(f"driver {driver}")
    return ", ".join([*parts, _clock(device, found)])


def triton_version() -> str:
    """Triton's version; '' where it is not installed."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def _driver() -> str:
    """Version of NVIDIA's driver, as Linux shows it; '' where it does not."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as lines:
            found = re.search(r"\d+\.\d+(\.\d+)?", lines.readline())
    except OSError:
        return ""
    return found.group() if found else ""


def _clock(device: torch.device, properties: object) -> str:
    try:
        return f"{torch.cuda.clock_rate(device)} MHz now"
    except Exception:  # no nvidia-ml-py, or a driver that does not tell: torch raises what that raises
        highest = getattr(properties, "clock_rate", 0)  # kHz
        return f"at most {highest // 1000} MHz" if highest else "clock unknown"
