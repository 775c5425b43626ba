"""Host models: which of timm's are supported, and their properties besides attention.

Supported are exactly these classes of model, block and attention (`projection.SUPPORTED`). Any other class is refused by
name before anything is computed; nothing is skipped silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from timm.layers import AttentionPoolLatent
from timm.models import naflexvit
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from sparsify.config import Geometry
from sparsify.errors import UnsupportedModel, UsageError
from sparsify.nn import projection

MODULES = ("vision_transformer", "deit", "beit", "eva", "naflexvit", "vision_transformer_hybrid", "vitamin")
"""timm's modules of the models that can be converted."""
MODELS = (VisionTransformer, VisionTransformerDistilled, Eva, Beit, naflexvit.NaFlexVit)
BLOCKS = (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm, BeitBlock)
LEFT_DENSE = (AttentionPoolLatent,)  # one query over all tokens: nothing to gain


def supported_attentions(model: nn.Module, name: str = "") -> dict[str, nn.Module]:
    """The attention modules to be replaced, by module name, in order of the blocks.

    name: of the model, for messages; '': its class.

    Raises:
        UnsupportedModel: an attention, block or model class that is not supported; the message names it.
    """
    subject = name or type(model).__name__
    if unknown := _unknown_attention(model):
        raise UnsupportedModel(f"{subject}: attention class {unknown} is not understood (see 'sparsify models')")
    if type(model) not in MODELS:
        message = f"{subject}: model class {type(model).__name__} is not understood (see 'sparsify models')"
        raise UnsupportedModel(message)
    attentions: dict[str, nn.Module] = {}
    for i, block in enumerate(cast(nn.Sequential, model.blocks)):
        if type(block) not in BLOCKS or type(getattr(block, "attn", None)) not in projection.SUPPORTED:
            raise UnsupportedModel(f"{subject}: block class {type(block).__name__} (blocks.{i}) is not understood")
        attentions[f"blocks.{i}.attn"] = cast(nn.Module, block.attn)
    return attentions


def geometry(model: nn.Module, attentions: Mapping[str, nn.Module]) -> Geometry:
    """The shape of a model with these attention modules, dense or grafted."""
    modules = list(attentions.values())
    heads, head_dim = projection.heads_of(modules[0]), min(map(projection.head_dim, modules))
    return Geometry(len(modules), heads, head_dim, num_tokens(model), num_prefix_tokens(model))


def rotary(model: nn.Module) -> bool:
    """Whether the model passes a rotary embedding to its attention."""
    return getattr(model, "rope", None) is not None


def position_bias(model: nn.Module, attention: nn.Module) -> Tensor | None:
    """Bias of a block's logits by relative position, [1, H, N, N]; None where there is none."""
    shared = getattr(model, "rel_pos_bias", None)
    return projection.position_bias(attention, None if shared is None else shared())


def biased(model: nn.Module) -> bool:
    """Whether the model adds biases to its logits: an additive mask in every call, which the kernels do not support."""
    return any(name.endswith("relative_position_bias_table") for name, _ in model.named_parameters())


def num_prefix_tokens(model: nn.Module) -> int:
    """P: number of cls, distillation and register tokens."""
    return int(cast(int, model.num_prefix_tokens))


def ranking_rows(model: nn.Module) -> int:
    """Number of leading tokens whose attention ranks the others: cls and distillation; 0 without a cls token."""
    holder = getattr(model, "embeds", model)
    return 0 if getattr(holder, "cls_token", None) is None else 1 + hasattr(model, "dist_token")


def embedding(model: nn.Module) -> nn.Module:
    """The module that maps images to patch tokens."""
    return cast(nn.Module, getattr(model, "embeds", None) or model.patch_embed)


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the model's images. NaFlexVit accepts any; the size is that of its `pretrained_cfg`."""
    if isinstance(model, naflexvit.NaFlexVit):
        height, width = cast(Any, model).pretrained_cfg["input_size"][-2:]
    else:
        height, width = cast(Any, model).patch_embed.img_size
    return int(height), int(width)


def stride(model: nn.Module) -> tuple[int, int]:
    """Image pixels per patch, height and width; for hybrids the backbone's reduction times its patch size."""
    embed = cast(Any, embedding(model))
    if not hasattr(embed, "feat_ratio"):
        return cast(tuple[int, int], tuple(embed.patch_size))
    height, width = embed.feat_ratio(as_scalar=False)
    return int(height), int(width)


def patch_grid(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches at the model's image size."""
    if isinstance(model, naflexvit.NaFlexVit):
        h, w = embedding(model).dynamic_feat_size(image_size(model))  # type: ignore[operator]
    else:
        h, w = cast(Any, model).patch_embed.grid_size
    return int(h), int(w)


def num_tokens(model: nn.Module) -> int:
    """N, prefix tokens included, at the model's image size."""
    h, w = patch_grid(model)
    return num_prefix_tokens(model) + h * w


def check_image_size(model: nn.Module, height: int, width: int, name: str = "") -> None:
    """Refuse image sizes that are no multiple of the patch size: timm would drop the remaining pixels silently.

    Not meant for a model's own size: some timm models drop pixels (SigLIP, 384 px with patches of 14).

    Args:
        height, width: in pixels.
        name: of the model, for the message; '': its architecture.

    Raises:
        UsageError: not positive, or not a multiple of the patch size (`stride`).
    """
    rows, columns = stride(model)
    size = str(height) if height == width else f"{height}x{width}"
    if min(height, width) < 1:
        raise UsageError(f"image size {size}: a positive number of pixels is expected")
    if height % rows or width % columns:
        config = getattr(model, "pretrained_cfg", None) or {}
        name = name or config.get("architecture") or type(model).__name__
        patch = str(rows) if rows == columns else f"{rows}x{columns}"
        raise UsageError(f"image size {size} is not a multiple of the patch size {patch} of {name}")


def set_image_size(model: nn.Module, height: int, width: int) -> None:
    """Set another image size of a dense model, in place: timm resamples position embeddings and biases.

    Raises:
        UsageError: this version of timm cannot do it for this model, or see `check_image_size`.
    """
    check_image_size(model, height, width)
    if isinstance(model, naflexvit.NaFlexVit):
        cast(Any, model).pretrained_cfg = {**cast(Any, model).pretrained_cfg, "input_size": (3, height, width)}
        return
    if not hasattr(model, "set_input_size"):
        raise UsageError(f"this timm has no other image size for {type(model).__name__}: convert it at that size")
    cast(Any, type(model)).set_input_size(model, img_size=(height, width))


def takes_any_size(model: nn.Module) -> bool:
    """Whether the model accepts images of other sizes as they are."""
    return isinstance(model, naflexvit.NaFlexVit) or bool(getattr(model, "dynamic_img_size", False))


def _unknown_attention(model: nn.Module) -> str:
    """Class name (and module name) of the first attention module that is not supported; '' where there is none."""
    inside = tuple(name + "." for name, module in model.named_modules() if isinstance(module, LEFT_DENSE))
    for name, module in model.named_modules():
        if type(module) in projection.SUPPORTED or isinstance(module, LEFT_DENSE) or name.startswith(inside):
            continue
        if re.search(r"attn|attention|msa$", type(module).__name__, re.IGNORECASE) and any(module.children()):
            return f"{type(module).__name__} ({name})" if name else type(module).__name__
    return ""
