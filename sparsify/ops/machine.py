"""What this machine is, in words."""

from __future__ import annotations

import os
import platform

import torch


def device_name(device: torch.device) -> str:
    """The processor's or the accelerator's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.lower().startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
