"""Small models of Hugging Face transformers with random weights, one of each sort that is understood, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SIDE = 32  # pixels; 4x4 patches
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
IMAGE = dict(image_size=SIDE, patch_size=8)
DINOV2 = {**{name: SIZE[name] for name in SIZE if name != "intermediate_size"}, **IMAGE}
LABELS = {0: "cat", 1: "dog", 2: "newt"}
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
BIASED = dict(use_relative_position_bias=True, use_mean_pooling=True)


class Case(NamedTuple):
    model: str  # class of transformers
    config: str  # its configuration class
    args: Mapping[str, Any]
    output: str  # what timm's model gives, by transformers' name of it; cls, mean: of the last hidden state
    nested: bool = False  # the configuration is of two towers


def case(model: str, config: str, output: str, nested: bool = False, **more: Any) -> Case:
    labels = {"id2label": LABELS} if output == "logits" and not nested else {}
    return Case(model, config, {**SIZE, **IMAGE, **labels, **more}, output, nested)


def _dinov2(model: str, config: str, output: str, **more: Any) -> Case:
    return Case(model, config, {**DINOV2, **({"id2label": LABELS} if output == "logits" else {}), **more}, output)


CASES: dict[str, Case] = {
    "vit": case("ViTForImageClassification", "ViTConfig", "logits"),
    "vit-features": case("ViTModel", "ViTConfig", "cls", qkv_bias=False, hidden_act="relu"),
    "vit-mim": case("ViTForMaskedImageModeling", "ViTConfig", "cls", encoder_stride=8),
    "deit": case("DeiTForImageClassification", "DeiTConfig", "logits"),
    "deit-features": case("DeiTModel", "DeiTConfig", "cls"),
    "deit-distilled": case("DeiTForImageClassificationWithTeacher", "DeiTConfig", "logits"),
    "vit-mae": case("ViTMAEModel", "ViTMAEConfig", "cls", mask_ratio=0.0),
    "vit-mae-pretraining": case("ViTMAEForPreTraining", "ViTMAEConfig", "cls", mask_ratio=0.0),
    "vit-msn": case("ViTMSNForImageClassification", "ViTMSNConfig", "logits"),
    "ijepa": case("IJepaForImageClassification", "IJepaConfig", "logits"),
    "ijepa-features": case("IJepaModel", "IJepaConfig", "mean"),
    "beit": case("BeitForImageClassification", "BeitConfig", "logits", **BIASED),
    "beit-absolute": case(
        "BeitModel", "BeitConfig", "pooler_output", use_absolute_position_embeddings=True, layer_scale_init_value=0.0
    ),
    "beit-cls": case("BeitForImageClassification", "BeitConfig", "logits", use_mean_pooling=False),
    "data2vec": case("Data2VecVisionForImageClassification", "Data2VecVisionConfig", "logits", **BIASED),
    "data2vec-shared": case(
        "Data2VecVisionModel", "Data2VecVisionConfig", "hidden", use_shared_relative_position_bias=True
    ),
    "dinov2": _dinov2("Dinov2Model", "Dinov2Config", "pooler_output"),
    "dinov2-classifier": _dinov2("Dinov2ForImageClassification", "Dinov2Config", "logits"),
    "dinov2-swiglu": _dinov2("Dinov2Model", "Dinov2Config", "pooler_output", use_swiglu_ffn=True),
    "dinov2-registers": _dinov2("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "pooler_output"),
    "dinov2-registers-classifier": _dinov2(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", "logits", use_swiglu_ffn=True
    ),
    "dinov3": case("DINOv3ViTModel", "DINOv3ViTConfig", "pooler_output", num_register_tokens=4),
    "dinov3-gated": case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        "pooler_output",
        use_gated_mlp=True,
        hidden_act="silu",
        query_bias=False,
        mlp_bias=False,
    ),
    "clip": case("CLIPModel", "CLIPConfig", "image_embeds", nested=True),
    "clip-tower": case("CLIPVisionModel", "CLIPVisionConfig", "pooler_output"),
    "clip-projection": case("CLIPVisionModelWithProjection", "CLIPVisionConfig", "image_embeds"),
    "clip-classifier": case("CLIPForImageClassification", "CLIPConfig", "logits", nested=True),
    "metaclip2": case("MetaClip2VisionModelWithProjection", "MetaClip2VisionConfig", "image_embeds", hidden_act="gelu"),
    "chinese-clip": case("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", "pooler_output"),
    "siglip": case("SiglipModel", "SiglipConfig", "pooler_output", nested=True),
    "siglip-tower": case("SiglipVisionModel", "SiglipVisionConfig", "pooler_output"),
    "siglip-classifier": case("SiglipForImageClassification", "SiglipConfig", "logits", nested=True),
}


def model(name: str, **changes: Any) -> Any:
    """The transformers model of a case, eval mode, with weights that attend unevenly; `changes`: of its configuration."""
    import transformers

    found = CASES[name]
    args = {**found.args, **changes}
    if found.nested:
        args = {"vision_config": args, "text_config": TEXT, "projection_dim": 24}
    torch.manual_seed(len(name))
    made = getattr(transformers, found.model)(getattr(transformers, found.config)(**args)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim < 2 else 0.15))
    return made


def images(side: int = SIDE) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def outputs(name: str, made: Any, x: Tensor, **how: Any) -> Tensor:
    """What transformers' model gives for images x [B, 3, H, W], as `Case.output` says."""
    found = CASES[name]
    if found.model.startswith("ViTMAE"):  # otherwise it shuffles the patches
        how["noise"] = torch.arange((x.shape[2] // 8) ** 2).float().expand(len(x), -1)
        made = getattr(made, "vit", made)
    if found.model == "ViTForMaskedImageModeling":
        made = made.vit
    if found.nested and found.output != "logits":
        return made.get_image_features(x, **how).pooler_output
    given = made(x, **how)
    if found.output in ("cls", "mean", "hidden"):
        hidden = given.last_hidden_state
        return {"cls": lambda: hidden[:, 0], "mean": lambda: hidden.mean(1), "hidden": lambda: hidden}[found.output]()
    return getattr(given, found.output)


@torch.inference_mode()
def timms(name: str, made: nn.Module, x: Tensor) -> Tensor:
    """The same of timm's model."""
    forward: Callable[[Tensor], Tensor] = made.forward_features if CASES[name].output == "hidden" else made  # type: ignore
    return forward(x)


def save(made: Any, folder: Path, **how: Any) -> Path:
    """`save_pretrained` without its progress bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    made.save_pretrained(folder, **how)
    return folder
