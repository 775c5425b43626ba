"""Metadata of an exported program: the header of the file that it was made from, and how to feed it.

Beside the keys of `sparsify.models.checkpoint` (but `format`, which is safetensors' own):

    sparsify.preprocessing  input_size [C, H, W], mean, std, interpolation, crop_pct, crop_mode: timm's words
    sparsify.export         format, batch (a number or "any"), input and output by name, library versions
    sparsify.labels         names of the classes in the order of the logits, where the file has them
"""

from __future__ import annotations

import json

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
    described = {
        "sparsify.preprocessing": json.dumps({key: config[key] for key in PREPROCESSING}, sort_keys=True),
        "sparsify.export": json.dumps(about, sort_keys=True),
    }
    labels = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if labels and isinstance(labels, list | tuple) and len(labels) == getattr(model, "num_classes", 0):
        described["sparsify.labels"] = json.dumps([str(label) for label in labels])
    return described
