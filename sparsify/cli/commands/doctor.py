"""`sparsify doctor`: what is here, what is missing, and how to get it."""

from __future__ import annotations

from sparsify.cli import machine, terminal
from sparsify.cli.preflight import preflight


def doctor() -> None:
    """Check the installation (versions, processor, CPU kernels, GPUs, cache, extras) and print what to type for each gap.

    Example: sparsify doctor > machine.txt
    """
    for line in machine.versions():
        terminal.line(line)
    preflight()
    import torch

    from sparsify.ops.devices import device_name, gpu_details

    for device in [torch.device("cuda", i) for i in range(torch.cuda.device_count())]:
        terminal.line(f"GPU: {device_name(device)}, {gpu_details(device)}")
    if not torch.cuda.is_available():
        terminal.line("GPU: none that this torch can use")
    for line in machine.found():
        terminal.line(line)
