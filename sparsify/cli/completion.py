"""What the shell offers after TAB. Nothing here imports torch or timm, so that it answers at once.

Each completer takes the text typed so far and returns what it may become. Where nothing fits, shells offer files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources

NAMES = "names.txt"  # `make names` writes it, from `sparsify models`
BACKENDS = ("auto", "cpu", "reference")
DEVICES = ("cpu", "cuda", "mps")
RUNTIMES = ("eager", "compile", "onnxruntime", "openvino")
KERNEL_PRECISIONS = ("input", "bf16")
PREDICTORS = ("head-lowrank", "token-lowrank")
TAILS = ("none", "mean", "cells", "clusters")
AGAINST = (*RUNTIMES, "onnxruntime-int8", "openvino-int8", "all")
WAYS = ("merge", "evit", "evit-fused")
IMPORTANCES = ("fitted", "attention")
GRANULARITIES = ("token", "tile")
FEATURES = ("patch", "pooled")
SCHEMES = ("hf-hub:", "local-dir:")

Completer = Callable[[str], list[str]]


def one_of(words: Sequence[str]) -> Completer:
    """Completes to one of `words`."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Model names that `convert` takes, and the prefixes of names on the hub and of folders."""
    known = (resources.files("sparsify.models") / NAMES).read_text(encoding="utf-8").split()
    return one_of([*known, *SCHEMES])(incomplete)


def recipes(incomplete: str) -> list[str]:
    """Names of the built-in recipes."""
    from sparsify.recipe import recipe_names

    return one_of(recipe_names())(incomplete)
