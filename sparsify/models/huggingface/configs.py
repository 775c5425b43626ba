"""config.json and preprocessor_config.json of transformers -> timm's architecture, its arguments and its preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import timm
from pydantic import BaseModel, ConfigDict, Field

from sparsify.config import validate
from sparsify.errors import UsageError, brief, field
from sparsify.models.huggingface.families import (
    CLASSIFIER,
    DISTILLED,
    ENDINGS,
    FAMILIES,
    FEATURES,
    PROJECTION,
    TOWER,
    Family,
    Kind,
    family,
)
from sparsify.models.huggingface.preprocessor import FILES, preprocessing

_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

Side = Annotated[int, Field(ge=1, le=1 << 14)]
Sides = Side | tuple[Side, Side] | tuple[Side]
Channels = Annotated[int, Field(ge=1, le=1 << 16)]


class Config(BaseModel):
    """The fields of a vision configuration that are read, with transformers' defaults."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    hidden_size: Channels = 768
    num_hidden_layers: Annotated[int, Field(ge=1, le=1 << 10)] = 12
    num_attention_heads: Annotated[int, Field(ge=1, le=1 << 10)] = 12
    intermediate_size: Channels = 3072
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] | None = None  # instead of `intermediate_size`
    hidden_act: str = "gelu"
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-12
    image_size: Sides = 224
    patch_size: Sides = 16
    num_channels: Annotated[int, Field(ge=1, le=64)] = 3
    qkv_bias: bool = True
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    use_mean_pooling: bool = True
    layer_scale_init_value: float = 0.1
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False
    use_gated_mlp: bool = False
    apply_layernorm: bool = True
    num_register_tokens: Annotated[int, Field(ge=0, le=1 << 10)] = 0
    rope_theta: Annotated[float, Field(gt=0, le=1e9)] = 100.0
    vision_use_head: bool = True
    projection_dim: Channels = 512

    @property
    def gated(self) -> bool:
        return self.use_swiglu_ffn or self.use_gated_mlp

    @property
    def hidden(self) -> int:
        """Rows of the first linear layer of an MLP, of both halves of a gated one that is joined."""
        if self.mlp_ratio is None:
            return self.intermediate_size
        hidden = int(self.hidden_size * self.mlp_ratio)
        return (hidden * 2 // 3 + 7) // 8 * 8 * 2 if self.use_swiglu_ffn else hidden


class Described(NamedTuple):
    """A checkpoint of transformers as a model of timm."""

    model_type: str
    kind: str
    architecture: str  # timm's
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    words: str  # one line on what it is and gives


def known() -> list[tuple[str, str]]:
    """What is understood, as (`model_type`, classes and an example)."""
    ending = {kind: name for name, kind in reversed(ENDINGS.items())} | {FEATURES: "Model"}
    return [
        (name, f"{', '.join(ending[kind] for kind in each.kinds)}; such as {each.example}")
        for name, each in FAMILIES.items()
    ]


def describe(
    tree: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None, kind: str | None = None
) -> Described:
    """The model of timm that a `config.json` of transformers describes.

    Args:
        tree: the content of config.json.
        preprocessor: that of preprocessor_config.json or processor_config.json; None: there is none.
        kind: of the weights, where they are known (`families.HEADS`); None: as the configuration names its class.

    Raises:
        UsageError: a `model_type`, a class or a form of it that is not understood, or a value that no model can have.
    """
    model_type = tree.get("model_type")
    known = family(model_type) if isinstance(model_type, str) else None
    if known is None or not isinstance(model_type, str):
        raise UsageError(f"a {brief(model_type)}, which is not understood ('sparsify models --from hf' lists what is)")
    vision = tree.get("vision_config") if not model_type.endswith(TOWER) else None
    nested = isinstance(vision, Mapping)
    given = {**known.config, **(vision if isinstance(vision, Mapping) else tree)}
    if isinstance(vision, Mapping):
        given.pop("projection_dim", None)
        given |= {"projection_dim": tree["projection_dim"]} if "projection_dim" in tree else {}
    config = validate(Config, {name: _tuple(value) for name, value in given.items()}, "config.json")
    kind = kind or _kind(tree, known, nested)
    if kind not in known.kinds:
        raise UsageError(f"a '{model_type}' with a head of another kind ({kind}), which is not understood")
    how = known.kinds[kind]
    args = _arguments(config, known, kind)
    labels = _labels(tree) if kind in (CLASSIFIER, DISTILLED) else ()
    classes = {FEATURES: 0, PROJECTION: config.projection_dim}.get(kind, len(labels))
    pixels = preprocessing(preprocessor or {}, known)
    side = pixels.pop("side", None)
    if known.any_size and side is not None and not any(each % args["patch_size"] for each in side):
        args["img_size"] = side
    args["num_classes"] = classes
    timms: dict[str, Any] = {
        "num_classes": classes,
        "input_size": (3, *args["img_size"]),
        "fixed_input_size": not known.any_size,
        "first_conv": "patch_embed.proj",
        "classifier": ("head", "head_dist") if kind == DISTILLED else "head",
        **pixels,
    }
    if labels and not all(name.startswith("LABEL_") for name in labels) and len(set(labels)) == len(labels):
        timms["label_names"] = labels
    architecture = _architecture(config, known, how)
    words = f"a '{model_type}' of Hugging Face transformers, built as timm's {architecture}; it gives {how.output}"
    if preprocessor is None:
        words += f"; no {FILES[0]}: mean and std as is usual for it ({field('mean')}, {field('std')})"
    return Described(model_type, kind, architecture, args, timms, words)


def _kind(tree: Mapping[str, Any], known: Family, nested: bool) -> str:
    classes = tree.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else ""
    found = next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), None)
    if found is not None:
        return found
    tower = name.endswith("VisionModel")
    return PROJECTION if nested and not tower and PROJECTION in known.kinds else FEATURES


def _labels(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes by number; transformers writes no `id2label` of the two that it has by default."""
    names = tree.get("id2label")
    if names is None:
        count = tree.get("num_labels", 2)
        return tuple(f"LABEL_{i}" for i in range(count if isinstance(count, int) and 0 < count <= 1 << 24 else 2))
    if not isinstance(names, Mapping) or {str(key) for key in names} != {str(i) for i in range(len(names))}:
        raise UsageError("config.json id2label: names of the classes by the numbers 0, 1, 2, ... are expected")
    ordered = tuple(names[str(i)] for i in range(len(names)))
    if not all(isinstance(name, str) for name in ordered):
        raise UsageError("config.json id2label: names of the classes are expected")
    return ordered


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _pair(value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, tuple) else (value,)
    return sides[0], sides[-1]


# ---- the arguments of timm ----


def _architecture(config: Config, known: Family, how: Kind) -> str:
    """timm's name: of the same size where it has one, else that of the base model, whose arguments are all replaced."""
    if config.gated and known.gated_architecture:
        return known.gated_architecture
    pattern, patch = how.architecture or known.architecture, _pair(config.patch_size)[0]
    names = [
        pattern.format(size=size, patch=side)
        for size in (_SIZES.get(config.hidden_size, "base"), "base")
        for side in (patch, 16, 14)
    ]
    return next(name for name in names if timm.is_model(name))


def _arguments(config: Config, known: Family, kind: str) -> dict[str, Any]:
    how, height = known.kinds[kind], _pair(config.patch_size)
    if height[0] != height[1]:
        raise UsageError(f"config.json patch_size: square patches are expected (given: {height[0]}x{height[1]})")
    act = _ACTIVATIONS.get(config.hidden_act)
    fixed = None if known.host == "vit" else "silu" if config.gated else "gelu"  # timm has no other
    if act is None or fixed not in (None, act):
        raise UsageError(f"config.json hidden_act: {brief(config.hidden_act)} is not understood for this model")
    if config.num_channels != 3:
        raise UsageError(f"config.json num_channels: images of 3 channels are expected (given: {config.num_channels})")
    if config.hidden_size % config.num_attention_heads:
        heads = f"{config.hidden_size} channels and {config.num_attention_heads} heads"
        raise UsageError(f"config.json: {heads}, which do not divide them")
    args = {
        "img_size": _pair(config.image_size),
        "patch_size": height[0],
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _ratio(config.hidden, config.hidden_size),
        "qkv_bias": config.qkv_bias,
        "norm_eps": config.layer_norm_eps,
    }
    own = {"vit": _vit, "beit": _beit, "eva": _eva}[known.host](config, known, act)
    return args | own | dict(known.args) | _pooling(config, known, kind) | dict(how.args)


def _ratio(rows: int, channels: int) -> float:
    """A ratio of which timm, which rounds down, makes this many rows."""
    return rows / channels if int(channels * (rows / channels)) == rows else (rows + 0.5) / channels


def _vit(config: Config, known: Family, act: str) -> dict[str, Any]:
    scaled = {"init_values": config.layerscale_value or 1e-5} if "dinov2" in known.architecture else {}
    return {"act_layer": "silu" if config.gated else act, **scaled}


def _beit(config: Config, known: Family, act: str) -> dict[str, Any]:
    return {
        "qkv_bias": True,
        "global_pool": "avg" if config.use_mean_pooling else "token",
        "init_values": max(config.layer_scale_init_value, 0.0),  # 0: none; timm takes None for its own
        "use_abs_pos_emb": config.use_absolute_position_embeddings,
        "use_rel_pos_bias": config.use_relative_position_bias,
        "use_shared_rel_pos_bias": config.use_shared_relative_position_bias,
    }


def _eva(config: Config, known: Family, act: str) -> dict[str, Any]:
    if config.key_bias:
        raise UsageError("config.json key_bias: keys without a bias are expected, as timm has them")
    return {
        "qkv_bias": config.query_bias or config.value_bias,
        "swiglu_mlp": config.gated,
        "init_values": config.layerscale_value or 1e-5,
        "num_reg_tokens": config.num_register_tokens,
        "rope_temperature": config.rope_theta,
    }


def _pooling(config: Config, known: Family, kind: str) -> dict[str, Any]:
    if "siglip" in known.architecture:
        head = config.vision_use_head
        return {"global_pool": "map"} if head else {"global_pool": "avg", "fc_norm": False}
    return {"reg_tokens": config.num_register_tokens} if known.folded else {}
