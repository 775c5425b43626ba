"""One small dense model of each supported kind, with random weights that attend unevenly."""

import inspect
import re
from collections.abc import Sequence

import timm
import torch
from timm.layers import Attention
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from sparsify.config import SparsityConfig
from sparsify.nn import graft, hosts
from sparsify.nn.attention import sparse_modules

ATTENTION = {"gated": dict(gated=True), "attn-dim": dict(attn_head_dim=40)}  # no timm name has these: built by hand

SMALL = dict(embed_dim=96, num_heads=3)
RAGGED = dict(
    attn_type="rope", qkv_fused=False, qk_norm=True, num_kv_heads=1, attn_only_layer_scale=True, init_values=1
)
"""Arguments of sapiens2: fewer heads of keys than of queries, q/k norms, no LayerScale behind the MLP."""

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
    "eva": ("eva_giant_patch14_224", SMALL),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "eva02-unfused": ("eva02_base_patch14_448", SMALL),
    "eva-unfused": ("eva02_base_patch14_448", dict(SMALL, use_rot_pos_emb=False)),
    "eva02-clip": ("eva02_base_patch16_clip_224", SMALL),
    "eva-post-norm": ("eva02_enormous_patch14_clip_224", SMALL),
    "dinov3": ("vit_small_patch16_dinov3", SMALL),
    "dinov3-qkv-bias": ("vit_small_patch16_dinov3_qkvb", SMALL),
    "perception-encoder": ("vit_pe_core_tiny_patch16_384", dict(SMALL, attn_pool_num_heads=2)),
    "rope-axial": ("vit_small_patch16_rope_224", SMALL),
    "rope-mixed": ("vit_small_patch16_rope_mixed_ape_224", SMALL),
    "rope-qk-norm-few-keys": ("eva02_tiny_patch14_224", {**SMALL, **RAGGED}),
    "beit": ("beit_base_patch16_224", dict(SMALL)),
    "beit-shared-bias": ("beit_base_patch16_224", dict(SMALL, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)),
    "beit-both-biases": ("beitv2_base_patch16_224", dict(SMALL, use_shared_rel_pos_bias=True)),
    "naflexvit": ("naflexvit_base_patch16_map", SMALL),
    "naflexvit-rope": ("naflexvit_base_patch16_gap", dict(SMALL, rope_type="axial", reg_tokens=2)),
    "hybrid": ("vit_tiny_r_s16_p8_224", {}),
}
if "num_kv_heads" not in inspect.signature(Eva.__init__).parameters:  # timm before 1.0.31
    del FAMILIES["rope-qk-norm-few-keys"]
PLAIN = list(FAMILIES)[: list(FAMILIES).index("eva")]
"""Those where the place of a token does not enter the attention."""


LEAVING = [family for family in FAMILIES if not family.startswith("naflex")]
"""Those that tokens may leave."""


def ways_of(ways: Sequence[str]) -> list[tuple[str, str]]:
    """Families that tokens may leave, each with one of `ways`: the plain ones with all, the others with the first."""
    others = [f for f in LEAVING if f not in PLAIN]
    return [(f, way) for f in PLAIN for way in ways] + [(f, ways[0]) for f in others]


def draw_importance(model: nn.Module) -> nn.Module:
    """Random weights where a stage goes by a fitted importance, in place."""
    g = torch.Generator().manual_seed(5)
    for name, weights in model.named_buffers():
        if name.endswith("attn.importance"):
            weights.copy_(torch.randn(weights.shape, generator=g) / 8)
    return model


def build(family: str, patches: int | None = 6, depth: int | None = 2, **more: object) -> nn.Module:
    """A dense model in eval mode; `patches` a side (None: the model's own size), `depth` blocks (None: its own).

    more: arguments of timm's constructor.
    """
    name, arguments = FAMILIES[family]
    arguments = {**arguments, **more}
    if patches is not None:
        side = 32 if "patch32" in name or "_r_s16" in name else 14 if "patch14" in name else 16
        arguments["img_size"] = side * patches
    if depth is not None:
        arguments["depth"] = depth
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 10, **arguments}).eval()
    if family in ATTENTION:
        for block in model.blocks:
            block.attn = Attention(192, 3, qkv_bias=True, **ATTENTION[family]).eval()
    if hosts.image_size(model) != (arguments.get("img_size"),) * 2 and patches is not None:
        hosts.set_image_size(model, arguments["img_size"], arguments["img_size"])  # NaFlexVit: its argument is another
    return raise_attention(model)


def raise_attention(model: nn.Module) -> nn.Module:
    """The model with attention that is uneven and reaches the output, as that of trained models; in place."""
    post = any(type(block) in (ResPostBlock, EvaBlockPostNorm) for block in model.blocks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name or (post and re.search(r"blocks\.\d+\.norm\d", name)):
                parameter.fill_(0.5)  # these start at 1e-5, which would hide the attention
            elif re.search(r"attn\.(qkv|q_proj|k_proj)\.weight", name):
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)  # logits of a few units, as trained models have
            elif re.search(r"attn\.(v_proj|proj)\.weight|mlp\.fc\d.*weight", name) and hosts.rotary(model):
                parameter.normal_(std=parameter.shape[1] ** -0.5)  # these start so small that nothing is left of images
            elif name.endswith("relative_position_bias_table"):
                parameter.normal_()
            elif re.search(r"\b(q|v)_bias$", name):
                parameter.normal_(std=0.5)
            elif name == "head.weight" and float(parameter.std()) < 0.015:
                parameter.normal_(std=parameter.shape[1] ** -0.5)  # Eva's and Beit's start a thousand times smaller
    return model


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    """Random images of the model's size: [batch, 3, H, W]."""
    h, w = hosts.image_size(model)
    return torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(1))


def grafted(family, patches=(4, 6), **settings):
    """A model of 64-pixel heads whose grid is not square; predictors are drawn, not fitted."""
    model = build(family, patches=None, img_size=tuple(14 * n if "dinov2" in family else 16 * n for n in patches))
    graft.graft(model, SparsityConfig(**{"keep": 0.25, "rank": 6, **settings}))
    torch.manual_seed(5)
    for module in sparse_modules(model).values():
        for parameter in module.predictor.parameters():
            torch.nn.init.normal_(parameter)
    return model
