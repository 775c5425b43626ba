"""Checks the installation before anything imports timm, so that a missing package is an error of one line."""

from __future__ import annotations

import importlib

from sparsify.errors import SparsifyError


def preflight() -> None:
    """Import torch, torchvision and timm; a `SparsifyError` names the one that is missing or does not fit the others."""
    for name in ("torch", "torchvision", "timm"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if name != "torch" and isinstance(error, ModuleNotFoundError) and error.name == name:
                advice = f"pip install {name}"
            elif name == "torch":
                advice = "pip install --force-reinstall torch torchvision"
            else:  # "operator torchvision::nms does not exist", undefined symbols, missing shared libraries
                version = getattr(importlib.import_module("torch"), "__version__", "?")
                advice = (
                    f"torchvision must be the release made for torch {version}: pip install --force-reinstall "
                    "torch torchvision, both from the same index"
                )
            raise SparsifyError(f"{name} cannot be imported ({reason}); {advice}") from error
