"""Packages of the distribution's extras: which one is missing, and what to type."""

from __future__ import annotations

import importlib.util

from sparsify.errors import SparsifyError

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("accelerate", "tensorboard"),
    "report": ("matplotlib",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "int8": ("nncf",),
    "quantise": ("torchao",),
}
"""The extras of `pyproject.toml` that commands use, and their packages."""


def missing(*packages: str) -> list[str]:
    """Those that are not installed; nothing is imported."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def advice(package: str) -> str:
    """What to type for a package of an extra."""
    extra = next(name for name, packages in EXTRAS.items() if package in packages)
    return f"pip install 'sparsify-vit[{extra}]'"


def need(user: str, *packages: str) -> None:
    """Raise `SparsifyError` if a package is not installed that `user`, the first words of the message, needs."""
    for name in missing(*packages):
        raise SparsifyError(f"{user} needs {name}: {advice(name)}")
