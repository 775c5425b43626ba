"""The architectures of Hugging Face transformers that are understood, each a table.

`names` maps transformers' names of modules and parameters to timm's: `*` is the number of a block, and of targets with the
same name and `[0]`, `[1]`, ... the rows are joined in that order. A name without its last part (weight, bias) stands for
all of the module; the full name goes first. Each table holds the names of files, and those that transformers 5 has in
memory where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Names = Mapping[str, str]

FEATURES, CLASSIFIER, DISTILLED, PROJECTION = "features", "classifier", "distilled", "projection"
ENDINGS = {  # of transformers' classes, the longer first
    "ForImageClassificationWithTeacher": DISTILLED,
    "ForImageClassification": CLASSIFIER,
    "ModelWithProjection": PROJECTION,
}
HEADS = {  # a module that only files of this kind have
    "distillation_classifier": DISTILLED,
    "classifier": CLASSIFIER,
    "visual_projection": PROJECTION,
}

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and standard deviation
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Kind:
    """A model of a family with one sort of output."""

    output: str  # what the converted model gives, in words
    names: Names = field(default_factory=dict)  # besides those of the family
    args: Mapping[str, Any] = field(default_factory=dict)  # timm's, besides those of the family
    without: tuple[str, ...] = ()  # beginnings of names that this model does not use
    architecture: str = ""  # timm's, where it is not the family's


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers."""

    example: str  # a repository of the hub
    host: str  # timm's class: vit, beit or eva
    architecture: str  # timm's name with {size} and {patch}; its arguments are all replaced
    names: Names
    kinds: Mapping[str, Kind]
    config: Mapping[str, Any]  # transformers' defaults where they are not `configs.Config`'s
    pixels: tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation without a preprocessor file
    args: Mapping[str, Any] = field(default_factory=dict)  # timm's that no config.json changes
    gated: Names = field(default_factory=dict)  # names of a gated MLP, over `names`
    gated_architecture: str = ""  # timm's name where the MLP is gated
    filled: Mapping[str, float] = field(default_factory=dict)  # timm's tensors that a file may lack: their value
    antialias: bool = False  # how transformers interpolates positions
    any_size: bool = False  # transformers takes images of any size, so that the preprocessor's is the model's
    folded: bool = False  # positions have one of the cls token, which timm adds to the token


_EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
}
_NORMS = {
    "encoder.layer.*.layernorm_before": "blocks.*.norm1",
    "encoder.layer.*.layernorm_after": "blocks.*.norm2",
    "layers.*.layernorm_before": "blocks.*.norm1",
    "layers.*.layernorm_after": "blocks.*.norm2",
}
_MLP = {
    "encoder.layer.*.intermediate.dense": "blocks.*.mlp.fc1",
    "encoder.layer.*.output.dense": "blocks.*.mlp.fc2",
    "layers.*.mlp.fc1": "blocks.*.mlp.fc1",
    "layers.*.mlp.fc2": "blocks.*.mlp.fc2",
}
_ATTENTION = {
    f"{block}.{name}": f"blocks.*.attn.{target}"
    for block in ("encoder.layer.*", "layers.*")
    for name, target in {
        "attention.attention.query": "qkv[0]",
        "attention.attention.key": "qkv[1]",
        "attention.attention.value": "qkv[2]",
        "attention.output.dense": "proj",
        "attention.q_proj": "qkv[0]",
        "attention.k_proj": "qkv[1]",
        "attention.v_proj": "qkv[2]",
        "attention.o_proj": "proj",
    }.items()
}
_HEAD = {"classifier": "head"}

# ---- vit, and what has its layers ----

VIT = {**_EMBEDDINGS, **_NORMS, **_MLP, **_ATTENTION, "layernorm": "norm"}
DEIT = VIT
IJEPA = VIT
_CLS = {
    FEATURES: Kind("the cls token after the last norm"),
    CLASSIFIER: Kind("logits", _HEAD),
}
_PLAIN = {"class_token": True, "global_pool": "token", "no_embed_class": False, "reg_tokens": 0, "pre_norm": False}

# ---- beit ----

BEIT = {
    **_EMBEDDINGS,
    **_NORMS,
    **_MLP,
    **_ATTENTION,
    **{
        f"{block}.attention.{name}.bias": f"blocks.*.attn.{target}"
        for block in ("encoder.layer.*", "layers.*")
        for name, target in {
            "attention.query": "q_bias",
            "attention.value": "v_bias",
            "q_proj": "q_bias",
            "v_proj": "v_bias",
        }.items()
    },
    "encoder.layer.*.attention.attention.relative_position_bias": "blocks.*.attn",
    "layers.*.relative_position_bias": "blocks.*.attn",
    "encoder.relative_position_bias": "rel_pos_bias",
    "relative_position_bias": "rel_pos_bias",
    "encoder.layer.*.lambda_1": "blocks.*.gamma_1",
    "encoder.layer.*.lambda_2": "blocks.*.gamma_2",
    "layers.*.lambda_1": "blocks.*.gamma_1",
    "layers.*.lambda_2": "blocks.*.gamma_2",
    "pooler.layernorm": "fc_norm",
    "layernorm": "norm",
}
DATA2VEC = BEIT
_POOLED = {
    FEATURES: Kind("the mean of the patches, normalised (the cls token with use_mean_pooling false)"),
    CLASSIFIER: Kind("logits", _HEAD),
}
_UNTRAINED_POOLER = {"fc_norm.weight": 1.0, "fc_norm.bias": 0.0}  # as in transformers, where a file has none

# ---- dinov2 and dinov3 ----

DINOV2 = {
    **_EMBEDDINGS,
    **_ATTENTION,
    "embeddings.register_tokens": "reg_token",
    "encoder.layer.*.norm1": "blocks.*.norm1",
    "encoder.layer.*.norm2": "blocks.*.norm2",
    "encoder.layer.*.layer_scale1.lambda1": "blocks.*.ls1.gamma",
    "encoder.layer.*.layer_scale2.lambda1": "blocks.*.ls2.gamma",
    "encoder.layer.*.mlp.fc1": "blocks.*.mlp.fc1",
    "encoder.layer.*.mlp.fc2": "blocks.*.mlp.fc2",
    "layernorm": "norm",
}
DINOV2_REGISTERS = DINOV2
DINOV2_GATED = {
    "encoder.layer.*.mlp.weights_in": "blocks.*.mlp.fc1",
    "encoder.layer.*.mlp.weights_out": "blocks.*.mlp.fc2",
    "encoder.layer.*.mlp.gate_proj": "blocks.*.mlp.fc1[0]",
    "encoder.layer.*.mlp.up_proj": "blocks.*.mlp.fc1[1]",
    "encoder.layer.*.mlp.down_proj": "blocks.*.mlp.fc2",
}
DINOV3 = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "layer.*.norm1": "blocks.*.norm1",
    "layer.*.norm2": "blocks.*.norm2",
    "layer.*.attention.q_proj": "blocks.*.attn.qkv[0]",
    "layer.*.attention.k_proj": "blocks.*.attn.qkv[1]",
    "layer.*.attention.v_proj": "blocks.*.attn.qkv[2]",
    "layer.*.attention.q_proj.bias": "blocks.*.attn.q_bias",
    "layer.*.attention.v_proj.bias": "blocks.*.attn.v_bias",
    "layer.*.attention.o_proj": "blocks.*.attn.proj",
    "layer.*.layer_scale1.lambda1": "blocks.*.gamma_1",
    "layer.*.layer_scale2.lambda1": "blocks.*.gamma_2",
    "layer.*.mlp.up_proj": "blocks.*.mlp.fc1",
    "layer.*.mlp.down_proj": "blocks.*.mlp.fc2",
    "norm": "norm",
}
DINOV3_GATED = {"layer.*.mlp.gate_proj": "blocks.*.mlp.fc1[0]", "layer.*.mlp.up_proj": "blocks.*.mlp.fc1[1]"}
_NO_BIAS = (
    *(f"blocks.*.attn.{name}" for name in ("q_bias", "v_bias", "proj.bias")),
    *(f"blocks.*.mlp.{name}.bias" for name in ("fc1", "fc2")),
)

# ---- clip and siglip ----

_TOWER = {
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.position_embedding.weight": "pos_embed",
    "encoder.layers.*.layer_norm1": "blocks.*.norm1",
    "encoder.layers.*.layer_norm2": "blocks.*.norm2",
    "encoder.layers.*.self_attn.q_proj": "blocks.*.attn.qkv[0]",
    "encoder.layers.*.self_attn.k_proj": "blocks.*.attn.qkv[1]",
    "encoder.layers.*.self_attn.v_proj": "blocks.*.attn.qkv[2]",
    "encoder.layers.*.self_attn.out_proj": "blocks.*.attn.proj",
    "encoder.layers.*.mlp.fc1": "blocks.*.mlp.fc1",
    "encoder.layers.*.mlp.fc2": "blocks.*.mlp.fc2",
    "post_layernorm": "norm",
}
CLIP = {**_TOWER, "embeddings.class_embedding": "cls_token", "pre_layrnorm": "norm_pre"}
SIGLIP = {
    **_TOWER,
    "head.probe": "attn_pool.latent",
    "head.attention.in_proj_weight": "attn_pool.q.weight | attn_pool.kv.weight",  # rows of q, then of k and v
    "head.attention.in_proj_bias": "attn_pool.q.bias | attn_pool.kv.bias",
    "head.attention.out_proj": "attn_pool.proj",
    "head.layernorm": "attn_pool.norm",
    "head.mlp.fc1": "attn_pool.mlp.fc1",
    "head.mlp.fc2": "attn_pool.mlp.fc2",
}
_CLIP_KINDS = {
    FEATURES: Kind("the cls token after the last norm"),
    PROJECTION: Kind("the image embedding", {"visual_projection": "head"}),
    CLASSIFIER: Kind("logits", _HEAD, {"global_pool": "avg", "final_norm": False}, without=("post_layernorm",)),
}
_SIGLIP_KINDS = {
    FEATURES: Kind("the pooled output (the mean of the patches with vision_use_head false)"),
    CLASSIFIER: Kind("logits", _HEAD, {"global_pool": "avg", "fc_norm": False}, without=("head.",)),
}


def _clip(example: str) -> Family:
    return Family(
        example,
        host="vit",
        architecture="vit_{size}_patch{patch}_clip_quickgelu_224",
        names=CLIP,
        kinds=_CLIP_KINDS,
        config={"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        args=_PLAIN | {"pre_norm": True},
        filled={"head.bias": 0.0},
        pixels=OPENAI,
    )


def _dinov2(example: str, patch: int, registers: int) -> Family:
    infix = "_reg4" if registers else ""
    return Family(
        example,
        host="vit",
        architecture=f"vit_{{size}}_patch{{patch}}{infix}_dinov2",
        names=DINOV2_REGISTERS if registers else DINOV2,
        kinds={FEATURES: _CLS[FEATURES], CLASSIFIER: Kind("logits", _HEAD, {"cls_and_mean": True})},
        config={"patch_size": patch, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "num_register_tokens": registers},
        args=_PLAIN | {"no_embed_class": bool(registers)},
        gated=DINOV2_GATED,
        gated_architecture=f"vit_giant_patch14{infix}_dinov2",
        antialias=bool(registers),
        any_size=True,
        folded=bool(registers),
        pixels=IMAGENET,
    )


def _vit(example: str, names: Names, pixels: Any, **more: Any) -> Family:
    return Family(
        example,
        host="vit",
        architecture="vit_{size}_patch{patch}_224",
        names=names,
        pixels=pixels,
        **{"kinds": _CLS, "config": {}, "args": _PLAIN, **more},
    )


def _beit(example: str, names: Names) -> Family:
    return Family(
        example,
        host="beit",
        architecture="beit_{size}_patch{patch}_224",
        names=names,
        kinds=_POOLED,
        config={},
        filled=_UNTRAINED_POOLER,
        pixels=HALF,
    )


_SIGLIP = Family(
    "google/siglip-base-patch16-224",
    host="vit",
    architecture="vit_{size}_patch{patch}_siglip_224",
    names=SIGLIP,
    kinds=_SIGLIP_KINDS,
    config={"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    args=_PLAIN | {"class_token": False},
    pixels=HALF,
)
_TOKEN = {"embeddings.distillation_token": "reg_token"}  # DeiT's second token, in timm a register
_DEIT_KINDS = {
    FEATURES: Kind(_CLS[FEATURES].output, _TOKEN, {"reg_tokens": 1}),
    CLASSIFIER: Kind("logits", _TOKEN | _HEAD, {"reg_tokens": 1}),
    DISTILLED: Kind(
        "the mean of the logits of both heads",
        {
            "embeddings.distillation_token": "dist_token",
            "cls_classifier": "head",
            "distillation_classifier": "head_dist",
        },
        architecture="deit_{size}_distilled_patch16_224",
    ),
}
_MEAN = {
    FEATURES: Kind("the mean of the tokens after the last norm"),
    CLASSIFIER: Kind("logits", _HEAD),
}

FAMILIES: Mapping[str, Family] = {
    "vit": _vit("google/vit-base-patch16-224", VIT, HALF),
    "deit": _vit("facebook/deit-base-distilled-patch16-224", DEIT, IMAGENET, kinds=_DEIT_KINDS),
    "vit_mae": _vit("facebook/vit-mae-base", VIT, IMAGENET),
    "vit_msn": _vit("facebook/vit-msn-base", VIT, IMAGENET, config={"layer_norm_eps": 1e-6}),
    "ijepa": _vit(
        "facebook/ijepa_vith14_1k",
        IJEPA,
        IMAGENET,
        kinds=_MEAN,
        args=_PLAIN | {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
    "beit": _beit("microsoft/beit-base-patch16-224", BEIT),
    "data2vec-vision": _beit("facebook/data2vec-vision-base-ft1k", DATA2VEC),
    "dinov2": _dinov2("facebook/dinov2-small", 14, 0),
    "dinov2_with_registers": _dinov2("facebook/dinov2-with-registers-small", 16, 4),
    "dinov3_vit": Family(
        "facebook/dinov3-vits16-pretrain-lvd1689m",
        host="eva",
        architecture="vit_{size}_patch{patch}_dinov3",
        names=DINOV3,
        kinds={FEATURES: _CLS[FEATURES]},
        config={
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "layer_norm_eps": 1e-5,
        },
        args={"global_pool": "token", "use_fc_norm": False, "swiglu_align_to": 0},
        gated=DINOV3_GATED,
        filled=dict.fromkeys(_NO_BIAS, 0.0),
        any_size=True,
        pixels=IMAGENET,
    ),
    "clip": _clip("openai/clip-vit-base-patch16"),
    "metaclip_2": _clip("facebook/metaclip-2-worldwide-huge-quickgelu"),
    "chinese_clip": _clip("OFA-Sys/chinese-clip-vit-base-patch16"),
    "siglip": _SIGLIP,
}
"""By `model_type`. `clip_vision_model` and its like, an image tower alone, are found by the name without that ending."""

TOWER = "_vision_model"  # ending of such a model_type


def family(model_type: str) -> Family | None:
    """The table of a `model_type`; None where it is not understood."""
    return FAMILIES.get(model_type.removesuffix(TOWER))
