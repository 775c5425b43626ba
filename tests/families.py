"""One small dense model of each supported kind, with random weights that attend unevenly."""

import timm
import torch
from timm.layers import Attention
from torch import nn

ATTENTION = {"gated": dict(gated=True), "attn-dim": dict(attn_head_dim=40)}  # no timm name has these: built by hand

FAMILIES = {
    "deit": ("deit_tiny_patch16_224", {}),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "vit-augreg": ("vit_tiny_patch16_224", {}),
    "vit-avg-pool": ("vit_tiny_patch16_224", dict(global_pool="avg", class_token=False)),
    "clip": ("vit_base_patch32_clip_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", dict(embed_dim=96, num_heads=3)),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {}),
    "ten-prefix-tokens": ("vit_tiny_patch16_224", dict(reg_tokens=9)),
    "res-post-norm": ("vit_base_patch16_rpn_224", dict(embed_dim=96, num_heads=3)),
    "qk-norm": ("vit_tiny_patch16_224", dict(qk_norm=True)),
    "gated": ("vit_tiny_patch16_224", {}),
    "attn-dim": ("vit_tiny_patch16_224", {}),
    "scale-norm": ("vit_tiny_patch16_224", dict(scale_attn_norm=True)),
}


def build(family: str, patches: int | None = 6, depth: int | None = 2, **more: object) -> nn.Module:
    """A dense model in eval mode; `patches` a side (None: the model's own size), `depth` blocks (None: its own).

    more: arguments of timm's constructor.
    """
    name, arguments = FAMILIES[family]
    arguments = {**arguments, **more}
    if patches is not None:
        side = 32 if "patch32" in name else 14 if "patch14" in name else 16
        arguments["img_size"] = side * patches
    if depth is not None:
        arguments["depth"] = depth
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 10, **arguments}).eval()
    if family in ATTENTION:
        for block in model.blocks:
            block.attn = Attention(192, 3, qkv_bias=True, **ATTENTION[family]).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "gamma" in parameter_name or (family == "res-post-norm" and "norm" in parameter_name):
                parameter.fill_(0.5)  # these start at 1e-5, which would hide the attention
            elif "qkv.weight" in parameter_name:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)  # logits of a few units, as trained models have
    return model


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    """Random images of the model's size: [batch, 3, H, W]."""
    h, w = model.patch_embed.img_size
    return torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(1))
