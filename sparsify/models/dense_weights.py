"""Tensors of a user's own checkpoint: read without unpickling anything else, unwrapped, compared with a model's."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from torch import nn

from sparsify.errors import BadFile, field, one_line
from sparsify.models.digits import network
from sparsify.nn import hosts


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a local checkpoint, on the CPU; nothing is unpickled but tensors and plain containers.

    Wrappers (`state_dict_ema`, `model_ema`, `state_dict`, `model`: the first that is there) and prefixes (`module.`,
    `_orig_mod.`) are stripped.

    Raises:
        BadFile: missing, not a checkpoint, truncated, with other objects than tensors, or made by sparsify.
    """
    if not os.path.isfile(path):
        raise BadFile(f"weights file {path} " + ("is a folder" if os.path.isdir(path) else "does not exist"))
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                if "sparsify.format" in (file.metadata() or {}):
                    raise BadFile(f"{path} is already converted by sparsify: give it to profile or eval")
                content: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own training checkpoints hold one
                content = torch.load(path, map_location="cpu", weights_only=True)
    except BadFile:
        raise
    except Exception as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise BadFile(f"{path} is not a checkpoint of tensors only; nothing else is unpickled") from error
        raise BadFile(f"{path} cannot be read as a checkpoint: {one_line(error, 120)}") from error
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise BadFile(f"{path} holds no state dict: a mapping from names to tensors is expected")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): tensor for name, tensor in content.items()}


def checkpoint_filter(architecture: str) -> Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]]:
    """timm's reader of original formats and other image sizes for `architecture`; the identity where it has none."""
    if architecture == network.ARCHITECTURE:
        architecture = "vit_tiny_patch16_224"
    name = timm.model_entrypoint(architecture).__module__
    filter_fn: Callable[..., Any] = getattr(sys.modules[name], "checkpoint_filter_fn", lambda state, model: state)
    return partial(filter_fn, adapt_layer_scale=True) if name.endswith(".deit") else filter_fn


def image_side(state: Mapping[str, torch.Tensor], frame: nn.Module) -> int | None:
    """Side in pixels of the square images that the position embedding or biases of a file were made for.

    None where that is the size of `frame`, not square, or unknown (a model with rotary embeddings only).
    """
    pos_embed, grid = state.get("pos_embed"), hosts.patch_grid(frame)
    tables = [t for name, t in state.items() if name.endswith("relative_position_bias_table")]
    if tables:  # (2h - 1)(2w - 1) distances, and three of the cls token
        root = math.isqrt(max(0, tables[0].shape[0] - 3))
        patches = ((root + 1) // 2) ** 2 if root % 2 and root * root == tables[0].shape[0] - 3 else 0
    elif pos_embed is not None and pos_embed.ndim == 3:
        prefix = 0 if getattr(frame, "no_embed_class", False) else hosts.num_prefix_tokens(frame)
        patches = pos_embed.shape[1] - prefix
    else:
        return None
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not patches or patches == grid[0] * grid[1]:
        return None
    return side * hosts.stride(frame)[0]


def check_fit(state: dict[str, torch.Tensor], model: nn.Module, path: Path, architecture: str, headless: bool) -> None:
    """`BadFile` where tensors of a file are missing, unexpected or of another shape than a model's; it names three of each.

    `headless`: the model has a head, the file does not: the message tells how to do without.
    """
    expected, given = ({name: list(t.shape) for name, t in tree.items()} for tree in (model.state_dict(), state))
    shapes = {name: shape for name, shape in expected.items() if given.get(name, shape) != shape}
    differences = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "other shape:": [f"{name} {given[name]} (expected {shape})" for name, shape in shapes.items()],
    }
    parts = [f"{what} {_some(names)}" for what, names in differences.items() if names]
    if parts:
        hint = f" (no head in the file: {field('num_classes')} 0 takes it for features)" if headless else ""
        raise BadFile(f"{path} does not fit {architecture}: {'; '.join(parts)}{hint}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
