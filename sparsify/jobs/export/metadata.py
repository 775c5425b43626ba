"""Metadata of an exported program: the header of the file that it was made from, and how to feed it.

Beside the keys of `sparsify.models.checkpoint` (but `format`, which is safetensors' own):

    sparsify.preprocessing  input_size [C, H, W], mean, std, interpolation, crop_pct, crop_mode: timm's words
    sparsify.export         format, batch (a number or "any"), input and output by name, library versions
    sparsify.labels         names of the classes in the order of the logits, where the file has them
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from sparsify.images import datasets
from sparsify.version import __version__

PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
INPUT = "images"


def output_name(model: nn.Module) -> str:
    """`logits`, or `features` of a model without a classifier."""
    return "logits" if getattr(model, "num_classes", 0) else "features"


def metadata(model: nn.Module, format: str, batch_size: int | None) -> dict[str, str]:
    """The keys above, of the model as it is exported."""
    config = datasets.data_config(model)
    about = {
        "format": format,
        "batch": batch_size or "any",
        "input": INPUT,
        "output": output_name(model),
        "versions": {"sparsify": __version__, "torch": torch.__version__},
    }
    found = {
        "sparsify.preprocessing": json.dumps({key: config[key] for key in PREPROCESSING}, sort_keys=True),
        "sparsify.export": json.dumps(about, sort_keys=True),
    }
    if labels := _labels(model):
        found["sparsify.labels"] = json.dumps(labels)
    return found


def _labels(model: nn.Module) -> list[str]:
    """Names of the classes, if the checkpoint has as many as there are logits."""
    pretrained: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = pretrained.get("label_names")
    known = isinstance(names, list | tuple) and len(names) == getattr(model, "num_classes", 0)
    return [str(name) for name in names] if known and names else []
