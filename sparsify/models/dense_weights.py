"""Tensors of a user's own checkpoint: read without unpickling anything else, unwrapped, compared with a model's."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from sparsify.errors import BadFile, field, one_line
from sparsify.files.tensors import opened
from sparsify.models import filetype, shards
from sparsify.models.digits import network
from sparsify.models.huggingface import tensors as huggingface
from sparsify.nn import hosts

_BLOCK = "blocks.0.norm1.weight"  # every model that converts has it
_PREFIXES = re.compile(
    r"^((module|_orig_mod|model|timm_model)\.)+"
)  # of wrappers, Lightning and transformers' TimmWrapper
_AVERAGED, _LAST = ("state_dict_ema", "model_ema"), ("state_dict", "model")  # keys of wrappers


class Checkpoint(NamedTuple):
    """The tensors of a file."""

    path: Path
    state: dict[str, Tensor]  # by the names of a model's state dict, on the CPU
    averaged: bool | None  # whether they are the moving average (EMA) of the weights; None: the file has no average
    own: bool = False  # the weights of the model that was named, not a user's

    @property
    def note(self) -> str:
        """One line for people on which weights were taken; '' where there was nothing to choose."""
        if self.averaged is None:
            return ""
        averaged, last = "the averaged weights (EMA)", "the last ones"
        taken, left = (averaged, last) if self.averaged else (last, averaged)
        return f"{self.path.name}: {taken} are taken, not {left} ({field('ema')} chooses)"


def read_checkpoint(path: Path, ema: bool | None = None) -> Checkpoint:
    """Tensors of a local checkpoint; nothing is unpickled but tensors and plain containers.

    Wrappers (`state_dict_ema`, `model_ema`, `state_dict`, `model`) and prefixes (`module.`, `_orig_mod.`, `model.`,
    `timm_model.`) are stripped. An index (`*.index.json`) stands for the shards beside it.

    Args:
        ema: take the moving average of the weights, or not; None: where the file has one.

    Raises:
        BadFile: missing, not a checkpoint, truncated, with other objects than tensors, without the average that was asked
            for, or made by sparsify.
    """
    if not os.path.isfile(path):
        raise BadFile(f"weights file {path} " + ("is a folder" if os.path.isdir(path) else "does not exist"))
    content = _of_shards(path) if shards.is_index(path) else _content(path)
    tree = content if isinstance(content, dict) else {}
    wrapped = {key: tree[key] for key in (*_AVERAGED, *_LAST) if isinstance(tree.get(key), dict)}
    has_average = not wrapped.keys().isdisjoint(_AVERAGED)
    if ema and not has_average:
        raise BadFile(f"{path} has no averaged weights ({' or '.join(_AVERAGED)}): leave {field('ema')} out")
    averaged = has_average and ema is not False
    tensors = next((wrapped[key] for key in (_AVERAGED if averaged else _LAST) if key in wrapped), tree)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise BadFile(f"{path} holds no state dict: a mapping from names to tensors is expected")
    state = {_PREFIXES.sub("", str(name)): tensor for name, tensor in tensors.items()}
    return Checkpoint(path, state, averaged if has_average else None)


def _of_shards(index: Path) -> dict[str, Any]:
    """The tensors of all shards of an index."""
    found: dict[str, Any] = {}
    for name, tensors in shards.of_index(index).items():
        path = index.with_name(name)
        if not path.is_file():
            raise BadFile(f"{index} names {name}, which does not lie beside it")
        content = _content(path)
        if not isinstance(content, dict):
            raise BadFile(f"{path} holds no state dict: a mapping from names to tensors is expected")
        missing = [tensor for tensor in tensors if tensor not in content]
        if missing:
            raise BadFile(f"{path} lacks tensors that {index.name} names: {_some(missing)}")
        found |= {tensor: content[tensor] for tensor in tensors}
    return found


def _content(path: Path) -> Any:
    """What is in the file, which may be named as it likes."""
    kind = filetype.of(path)
    if not kind:
        raise BadFile(f"{path} cannot be read as a checkpoint: it begins like no file of safetensors or PyTorch")
    try:
        if kind == filetype.TORCH:
            # timm's own training checkpoints hold a Namespace; of an open file torch does not ask the name
            with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        with opened(path) as tensors:
            if "sparsify.format" in tensors.metadata:
                raise BadFile(f"{path} is already converted by sparsify: give it to profile or eval")
            return {name: tensors.read(name) for name in tensors.entries}
    except BadFile:
        raise
    except Exception as error:
        if "weights_only" in str(error):
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f"holds {found[1] if found else 'other objects'} besides tensors, and nothing else is unpickled"
            raise BadFile(f"{path} {what}: save its state dict alone, with torch.save or safetensors") from error
        raise BadFile(f"{path} cannot be read as a checkpoint: {one_line(error, 120)}") from error


def checkpoint_filter(architecture: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """timm's reader of original formats and other image sizes for `architecture`; the identity where it has none."""
    if architecture == network.ARCHITECTURE:
        architecture = "vit_tiny_patch16_224"
    name = timm.model_entrypoint(architecture).__module__
    filter_fn: Callable[..., Any] = getattr(sys.modules[name], "checkpoint_filter_fn", lambda state, model: state)
    return partial(filter_fn, adapt_layer_scale=True) if name.endswith(".deit") else filter_fn


def image_side(state: Mapping[str, Tensor], frame: nn.Module) -> int | None:
    """Side in pixels of the square images that the position embedding or biases of a file were made for.

    None where that is the size of `frame`, not square, or unknown (a model with rotary embeddings only).
    """
    patches, grid = _patches(state, frame), hosts.patch_grid(frame)
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not patches or patches == grid[0] * grid[1]:
        return None
    return side * hosts.stride(frame)[0]


def check_positions(state: Mapping[str, Tensor], frame: nn.Module, path: Path, architecture: str) -> None:
    """`BadFile` where the positions of a file can be those of no square image, nor of an image of `frame`."""
    patches, grid = _patches(state, frame), hosts.patch_grid(frame)
    if "pos_embed" not in state or patches in (0, grid[0] * grid[1]) or math.isqrt(max(patches, 0)) ** 2 == patches:
        return
    positions, prefix = state["pos_embed"].shape[1], state["pos_embed"].shape[1] - patches
    why = "it was made for images that are not square, which only a folder (local-dir:) can say"
    if "dist_token" in state:
        why = "it is a distilled model: name its architecture, such as deit_tiny_distilled_patch16_224"
    expected = f"{prefix} and a square number of patches are expected"
    raise BadFile(f"{path} does not fit {architecture}: {positions} positions, {expected}; {why}")


def _patches(state: Mapping[str, Tensor], frame: nn.Module) -> int:
    """Patches of an image that a file's position embedding or biases were made for; 0: not square, or unknown."""
    pos_embed = state.get("pos_embed")
    tables = [t for name, t in state.items() if name.endswith("relative_position_bias_table")]
    if tables:  # (2h - 1)(2w - 1) distances, and three of the cls token
        root = math.isqrt(max(0, tables[0].shape[0] - 3))
        return ((root + 1) // 2) ** 2 if root % 2 and root * root == tables[0].shape[0] - 3 else 0
    if pos_embed is None or pos_embed.ndim != 3:
        return 0
    prefix = 0 if getattr(frame, "no_embed_class", False) else hosts.num_prefix_tokens(frame)
    return pos_embed.shape[1] - prefix


def check_fit(state: dict[str, Tensor], model: nn.Module, path: Path, architecture: str, headless: bool) -> None:
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
        raise BadFile(f"{path} does not fit {architecture}: {'; '.join(parts)}{_advice(given, architecture, headless)}")


def _advice(given: Collection[str], architecture: str, headless: bool) -> str:
    """What names of tensors say about a file that does not fit, in brackets; '' where they say nothing."""
    first = [name.removesuffix(_BLOCK) for name in given if name.endswith("." + _BLOCK)]
    if first and _BLOCK not in given:
        return f" (its names begin with '{first[0]}': save the state dict without that)"
    if huggingface.is_transformers(given):
        how = f"give its repository (ORG/NAME) or its folder as the model, and this file by {field('weights')}"
        return f" (its names are those of Hugging Face transformers: {how})"
    if "fc_norm.weight" in given and "norm.weight" not in given:
        config = {"architecture": architecture, "model_args": {"global_pool": "avg"}, "pretrained_cfg": {}}
        folder = f"local-dir:FOLDER of it as model.safetensors and of a config.json {json.dumps(config)}"
        return f" (it pools by the mean, fc_norm: give {folder})"
    return f" (no head in the file: {field('num_classes')} 0 takes it for features)" if headless else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
