"""What sparsify runs on here, without importing torch: the lines of `--version` and, with what is missing, of `doctor`."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from sparsify import extras
from sparsify.ops.cpu import build, processor
from sparsify.version import __version__

FOR = {
    "train": "fine-tuning, several processes",
    "report": "plots and pictures",
    "export": "ONNX",
    "openvino": "OpenVINO",
    "int8": "OpenVINO in int8",
    "quantise": "int8 by torchao",
}
"""What each extra is good for."""


def versions() -> list[str]:
    """This package, what it is built on, and the processor with its kernels."""
    packages = ", ".join(_installed(name) for name in ("torch", "torchvision", "timm"))
    isa = processor.isa() or "no AVX2"
    return [
        f"sparsify {__version__}",
        f"{packages}, Python {platform.python_version()}",
        f"{processor.name()}, {os.cpu_count()} processors, {isa}",
        f"CPU kernels: {build.state()}",
    ]


def found() -> list[str]:
    """The cache, and each extra with what to type for it."""
    lines = []
    try:
        folder = build.cache_dir()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        lines.append(f"cache: {folder}, {size / 1e6:.1f} MB (SPARSIFY_CACHE names another)")
    except (RuntimeError, OSError) as error:
        lines.append(f"cache: none ({error}); set SPARSIFY_CACHE to a folder")
    for extra, packages in extras.EXTRAS.items():
        missing = extras.missing(*packages)
        here = ", ".join(_installed(name) for name in packages if name not in missing)
        lack = f"{', '.join(missing)} missing: {extras.advice(missing[0])}" if missing else ""
        lines.append(f"{FOR[extra]}: {'; '.join(filter(None, (here, lack)))}")
    return lines


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} missing"
