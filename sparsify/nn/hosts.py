"""Host models: which of timm's are understood, and what has to be known of them besides their attention.

Understood are exactly these classes of model, block and attention (`projection.UNDERSTOOD`). Everything else is refused
by its class name before anything is computed; nothing is skipped in silence.
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
"""timm's modules that hold the models that can be converted."""
MODELS = (VisionTransformer, VisionTransformerDistilled, Eva, Beit, naflexvit.NaFlexVit)
BLOCKS = (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm, BeitBlock)
LEFT_DENSE = (AttentionPoolLatent,)  # one query over all tokens: nothing to gain


def check(model: nn.Module, name: str = "") -> dict[str, nn.Module]:
    """The attention modules that will be exchanged, by module name, in order of the blocks.

    Raises:
        UnsupportedModel: an attention, block or model class that is not understood, named.
    """
    found: dict[str, nn.Module] = {}
    subject = name or type(model).__name__
    strange = _strange_attention(model)
    if strange:
        raise UnsupportedModel(f"{subject}: attention class {strange} is not understood (see 'sparsify models')")
    if type(model) not in MODELS:
        raise UnsupportedModel(
            f"{subject}: model class {type(model).__name__} is not understood (see 'sparsify models')"
        )
    for i, block in enumerate(cast(nn.Sequential, model.blocks)):
        if type(block) not in BLOCKS or type(getattr(block, "attn", None)) not in projection.UNDERSTOOD:
            raise UnsupportedModel(f"{subject}: block class {type(block).__name__} (blocks.{i}) is not understood")
        found[f"blocks.{i}.attn"] = cast(nn.Module, block.attn)
    return found


def shape(attentions: Mapping[str, nn.Module]) -> tuple[int, int, int]:
    """Blocks, heads of a block, and size of a head (the smallest of all blocks)."""
    modules = list(attentions.values())
    return len(modules), projection.heads_of(modules[0]), min(map(projection.head_dim, modules))


def geometry(model: nn.Module, attentions: Mapping[str, nn.Module]) -> Geometry:
    """The shape of a model with these attention modules, dense or grafted."""
    return Geometry(*shape(attentions), num_tokens(model), num_prefix_tokens(model))


def rotary(model: nn.Module) -> bool:
    """Whether the model passes a rotary embedding to its attention."""
    return getattr(model, "rope", None) is not None


def position_bias(model: nn.Module, attention: nn.Module) -> Tensor | None:
    """What a block's attention adds to its logits by relative position, [1, H, N, N]; None where it adds nothing."""
    shared = getattr(model, "rel_pos_bias", None)
    return projection.position_bias(attention, None if shared is None else shared())


def biased(model: nn.Module) -> bool:
    """Whether the model adds biases to its logits: an additive mask in every call, which the kernels do not take."""
    names = [name for name, _ in model.named_parameters()]
    return any(name.endswith("relative_position_bias_table") for name in names)


def num_prefix_tokens(model: nn.Module) -> int:
    """P: cls, distillation and register tokens."""
    return int(cast(int, model.num_prefix_tokens))


def ranking_rows(model: nn.Module) -> int:
    """Leading tokens whose attention ranks the others: cls and distillation; 0 where there is none."""
    holder = getattr(model, "embeds", model)
    return 0 if getattr(holder, "cls_token", None) is None else 1 + hasattr(model, "dist_token")


def embedding(model: nn.Module) -> nn.Module:
    """What turns an image into patches."""
    return cast(nn.Module, getattr(model, "embeds", None) or model.patch_embed)


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the model's own images. NaFlexVit takes any; its own are those of its `pretrained_cfg`."""
    if isinstance(model, naflexvit.NaFlexVit):
        height, width = cast(Any, model).pretrained_cfg["input_size"][-2:]
    else:
        height, width = cast(Any, model).patch_embed.img_size
    return int(height), int(width)


def stride(model: nn.Module) -> tuple[int, int]:
    """Pixels of a patch, height and width: what the backbone of a hybrid leaves of an image times its patches."""
    embed = cast(Any, embedding(model))
    if not hasattr(embed, "feat_ratio"):
        return cast(tuple[int, int], tuple(embed.patch_size))
    height, width = embed.feat_ratio(as_scalar=False)
    return int(height), int(width)


def patch_grid(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches at the model's own image size."""
    if isinstance(model, naflexvit.NaFlexVit):
        h, w = embedding(model).dynamic_feat_size(image_size(model))  # type: ignore[operator]
    else:
        h, w = cast(Any, model).patch_embed.grid_size
    return int(h), int(w)


def num_tokens(model: nn.Module) -> int:
    """N, prefix tokens included, at the model's own image size."""
    h, w = patch_grid(model)
    return num_prefix_tokens(model) + h * w


def check_image_size(model: nn.Module, height: int, width: int, name: str = "") -> None:
    """Refuse images of which whole patches do not cover every pixel: timm would drop the rest without a word.

    A model's own size is not checked: timm has names (SigLIP, 384 px with patches of 14) that drop some pixels.

    Args:
        height, width: pixels of the images.
        name: of the model, for the message; '' is its architecture.

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
    """Another image size of a dense model, in place: timm resamples position embeddings and biases.

    Raises:
        UsageError: this timm cannot do it for this model, or not with this size (`check_image_size`).
    """
    check_image_size(model, height, width)
    if isinstance(model, naflexvit.NaFlexVit):
        cast(Any, model).pretrained_cfg = {**cast(Any, model).pretrained_cfg, "input_size": (3, height, width)}
        return
    if not hasattr(model, "set_input_size"):
        raise UsageError(f"this timm has no other image size for {type(model).__name__}: convert it at that size")
    cast(Any, model).set_input_size(img_size=(height, width))


def takes_any_size(model: nn.Module) -> bool:
    """Whether images of another size than its own may be given to it as they are."""
    return isinstance(model, naflexvit.NaFlexVit) or bool(getattr(model, "dynamic_img_size", False))


def _strange_attention(model: nn.Module) -> str:
    """Class name (and place) of the first attention module that is not understood; '' where there is none."""
    inside = tuple(name + "." for name, module in model.named_modules() if isinstance(module, LEFT_DENSE))
    for name, module in model.named_modules():
        if type(module) in projection.UNDERSTOOD or isinstance(module, LEFT_DENSE) or name.startswith(inside):
            continue
        if re.search(r"attn|attention|msa$", type(module).__name__, re.IGNORECASE) and any(module.children()):
            return f"{type(module).__name__} ({name})" if name else type(module).__name__
    return ""
