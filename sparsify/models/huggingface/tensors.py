"""A state dict of transformers -> one of timm, by the table of its family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify.models.huggingface.families import FEATURES, HEADS, Family
from sparsify.nn import hosts

_BASES = "model vit deit beit data2vec_vision dinov2 dinov2_with_registers ijepa vision_model".split()
_BASE = re.compile(rf"^(({'|'.join(_BASES)})\.)+")
_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")
_PART = re.compile(r"(.*)\[(\d)\]")
_UNUSED = re.compile(  # pooling with tanh, text, decoders and heads of pretraining, and what is computed
    r"(pooler\.dense|text_model|text_projection|logit_scale|logit_bias|decoder|lm_head|embeddings\.mask_token)(\.|$)"
    r"|(position_ids|relative_position_index|inv_freq)$"
)
_TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed", "attn_pool.latent")


def kind_of(names: Iterable[str]) -> str:
    """The kind of a model by the names of its tensors, `families.HEADS`."""
    modules = {_BASE.sub("", name).partition(".")[0] for name in names}
    return next((kind for module, kind in HEADS.items() if module in modules), FEATURES)


def is_transformers(names: Iterable[str]) -> bool:
    """Whether names of tensors are those of transformers rather than of timm."""
    return any(re.search(r"(^|\.)(embeddings\.patch_embeddings?|encoder\.layers?\.0)\.", name) for name in names)


def translated(state: Mapping[str, Tensor], frame: nn.Module, known: Family) -> dict[str, Tensor]:
    """The tensors of a model of `known` by timm's names; a name that no table has stays as it is.

    Args:
        frame: timm's model of the same kind, for tensors that transformers leaves out.
    """
    plain = {_BASE.sub("", name): tensor for name, tensor in state.items()}
    how = known.kinds.get(kind_of(state), known.kinds[FEATURES])
    table = {**known.names, **how.names}
    if any(re.search(r"\.(gate_proj|weights_in)\.", name) for name in plain):
        table |= known.gated
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in plain.items():
        if _UNUSED.search(name) or name.startswith(how.without) or not tensor.numel():
            continue
        target = _target(name, table)
        if " | " in target:
            first, second = target.split(" | ")
            rows = len(tensor) // 3
            found |= {first: tensor[:rows], second: tensor[rows:]}
        elif part := _PART.fullmatch(target):
            parts.setdefault(part[1], {})[int(part[2])] = tensor
        else:
            found[target] = tensor
    found |= {name: torch.cat([rows[i] for i in sorted(rows)]) for name, rows in parts.items()}
    return _completed(found, cast(Any, frame).state_dict(), known)


def _target(name: str, table: Mapping[str, str]) -> str:
    """timm's name of a tensor, or `name`."""
    block = _BLOCK.search(f".{name}")
    general = name if block is None else f".{name}".replace(f".{block[0]}.", ".*.", 1)[1:]
    stem, _, ending = general.rpartition(".")
    if general in table:
        target = table[general]
    elif stem in table:
        part = _PART.fullmatch(table[stem])
        target = f"{part[1]}.{ending}[{part[2]}]" if part else f"{table[stem]}.{ending}"
    else:
        return name
    return target if block is None else target.replace("*", block[0])


def _completed(found: dict[str, Tensor], expected: Mapping[str, Tensor], known: Family) -> dict[str, Tensor]:
    """`found` in timm's shapes, with what its family may lack."""
    for name in _TOKENS:
        if name in found and found[name].ndim < 3:
            found[name] = found[name].reshape(1, -1, found[name].shape[-1])
    if known.folded and {"cls_token", "pos_embed"} <= found.keys():
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    if "fc_norm.weight" in known.filled and "norm.weight" not in expected:
        found = {name: tensor for name, tensor in found.items() if not name.startswith("norm.")}  # of pretraining
    for pattern, value in known.filled.items():
        names = [name for name in expected if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name)]
        if not any(name in found for name in names):
            found |= {name: torch.full(expected[name].shape, value) for name in names}
    return found


def resampled(state: dict[str, Tensor], frame: nn.Module, known: Family) -> dict[str, Tensor]:
    """`state` with position embeddings for the image size of `frame`, as transformers interpolates those of a family.

    Most of its models lack the filter against aliasing that timm has, so that timm's smaller grids differ.
    """
    positions, (height, width) = state.get("pos_embed"), hosts.patch_grid(frame)
    if positions is None or positions.ndim != 3:
        return state
    prefix = 0 if getattr(frame, "no_embed_class", False) else hosts.num_prefix_tokens(frame)
    leading, grid = positions[:, :prefix].float(), positions[:, prefix:].float()
    side = round(grid.shape[1] ** 0.5)
    if grid.shape[1] == height * width or side * side != grid.shape[1]:
        return state
    square = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, C, side, side)
    square = functional.interpolate(
        square, (height, width), mode="bicubic", align_corners=False, antialias=known.antialias
    )
    grid = square.permute(0, 2, 3, 1).reshape(1, height * width, -1)
    return {**state, "pos_embed": torch.cat([leading, grid], 1)}
