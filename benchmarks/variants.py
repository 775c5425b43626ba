"""Models to compare: DeiT-Tiny converted from its real weights and photographs, and one model computed in several ways."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
from accuracy import DATA, WEIGHTS
from torch import nn

import sparsify
from sparsify.measure.macs import replica
from sparsify.nn import attention
from sparsify.nn.attention import Execution
from sparsify.nn.execution import set_execution
from sparsify.recipe import load_recipe


def deit_tiny(side: int, calib_images: int) -> nn.Module:
    """Real weights, keep 0.1, calibrated on photographs at that image size (position embedding resampled); float32."""
    recipe = load_recipe("calibrate").override(keep=0.1, calib_images=calib_images)
    options = dict(recipe=recipe, weights=WEIGHTS, data=DATA / "imagenet-sample" / "train", img_size=side)
    with tempfile.TemporaryDirectory() as folder:
        return sparsify.convert("deit_tiny", output=Path(folder) / "model.safetensors", **options).model.eval()


def variant(sparse: nn.Module, execution: Execution, tile: tuple[int, ...] = ()) -> nn.Module:
    """The same tensors, computed in another way: with one key set for each tile of queries, or for each query."""
    model = replica(sparse, torch.device("cpu"))
    for module in attention.sparse_modules(model).values():
        module.sparsity = dataclasses.replace(module.sparsity, tile=tile)
    set_execution(model, execution)
    return model
