"""Dense models without their weights: on the meta device, or of zeros; what they are as JSON, and from it again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, cast

import timm
import torch
from timm.models._pretrained import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sparsify.errors import BadFile, UnsupportedModel, UsageError, one_line
from sparsify.models.digits import network
from sparsify.models.names import Source
from sparsify.nn import hosts

_SOURCE_KEYS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")  # where weights came from


def skeleton(source: Source, num_classes: int | None = None, img_size: int | None = None) -> nn.Module:
    """The model on the meta device: shapes and classes, no weights, no memory.

    `num_classes` and `img_size` (pixels, square) override the model's own.

    Raises:
        UsageError: an image size that is not a multiple of the patch size.
        UnsupportedModel: timm cannot build it with these arguments.
    """
    if num_classes is not None and num_classes < 0:
        raise UsageError(f"number of classes {num_classes}: 0 (features) or more is expected")
    args = args_of(source, num_classes, img_size)
    config = source.pretrained_cfg or tag(source)
    if img_size is not None:
        own = _meta(source.architecture, args_of(source, num_classes, None), config)
        if type(own) in hosts.MODELS:
            hosts.check_image_size(own, img_size, img_size, source.asked)
    return _meta(source.architecture, args, config)


def shallow(architecture: str, **arguments: Any) -> nn.Module:
    """An architecture on the meta device, one block deep.

    Raises:
        UnsupportedModel: timm cannot build it so.
    """
    try:
        return _meta(architecture, {"depth": 1, **arguments}, None)
    except UnsupportedModel as error:
        if "num_kv_heads" not in str(error):
            raise
    return _meta(architecture, {"depth": 1, "num_kv_heads": (1,), **arguments}, None)  # it lists one for each block


def note(model: nn.Module, source: Source) -> str:
    """One line on where a loaded model differs from its architecture's default (classes, image size); '' if nowhere."""
    default = skeleton(source)
    changes = []
    if model.num_classes != default.num_classes:
        changes.append(f"{model.num_classes} classes instead of {default.num_classes}")
    if hosts.image_size(model) != hosts.image_size(default):
        changes.append("{}x{} px instead of {}x{}".format(*hosts.image_size(model), *hosts.image_size(default)))
    return f"{source.architecture} with {' and '.join(changes)}" if changes else ""


def describe(model: nn.Module, source: Source) -> dict[str, Any]:
    """JSON-able `architecture`, `model_args` and `pretrained_cfg` (preprocessing, licence, classifier) for `rebuild`.

    Places of weights (URLs, local paths) are left out: they would go stale, or tell about the user's machine.
    """
    kept = {k: v for k, v in cast(dict, model.pretrained_cfg).items() if k not in _SOURCE_KEYS and v is not None}
    args = {**source.model_args, "num_classes": model.num_classes, "img_size": hosts.image_size(model)}
    return json.loads(json.dumps({"architecture": source.architecture, "model_args": args, "pretrained_cfg": kept}))


def rebuild(architecture: str, model_args: dict[str, Any], pretrained_cfg: dict[str, Any]) -> nn.Module:
    """The dense model that `describe` described: CPU, float32, eval mode, every parameter zero; no network.

    Raises:
        BadFile: an architecture that this timm does not have, or arguments it does not take.
    """
    if architecture != network.ARCHITECTURE and not timm.is_model(architecture):
        raise BadFile(f"architecture {architecture} is not in timm {timm.__version__}: a newer timm may have it")
    known = {field.name for field in dataclasses.fields(PretrainedCfg)} - set(_SOURCE_KEYS)
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in pretrained_cfg.items() if k in known}
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in model_args.items()}
    try:
        return settle(materialise(lambda: build(architecture, args, config))).eval()
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError, KeyError) as error:
        raise BadFile(f"{architecture} cannot be built with the arguments in the file: {one_line(error)}") from error


def build(architecture: str, args: dict[str, Any], config: dict[str, Any] | str | None) -> nn.Module:
    """timm's model, or that of `digits`, without its weights; `config`: its `pretrained_cfg`, a tag, or None, timm's own."""
    if architecture != network.ARCHITECTURE:
        return sized(timm.create_model(architecture, pretrained=False, pretrained_cfg=config, **args), args)
    model = VisionTransformer(**args)
    return _with_config(model, config if isinstance(config, dict) else network.DATA_CONFIG)


def sized(model: nn.Module, args: dict[str, Any]) -> nn.Module:
    """The model, with the image size asked for where its constructor takes no notice of it (NaFlexVit)."""
    size = args.get("img_size")
    if size is not None and type(model) in hosts.MODELS:
        height, width = (size, size) if isinstance(size, int) else size
        if hosts.image_size(model) != (height, width):
            hosts.set_image_size(model, height, width)
    return model


def _with_config(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    host = cast(Any, model)
    host.pretrained_cfg = host.default_cfg = dict(config)
    return model


def args_of(source: Source, num_classes: int | None, img_size: int | None) -> dict[str, Any]:
    """What builds the model of `source` with these classes and this image size (`skeleton`)."""
    asked = {"num_classes": num_classes, "img_size": img_size}
    return {**source.model_args, **{k: v for k, v in asked.items() if v is not None}}


def _meta(architecture: str, args: dict[str, Any], config: dict[str, Any] | str | None) -> nn.Module:
    try:
        with torch.device("meta"):
            return build(architecture, args, config)
    except Exception as error:  # whatever one of timm's 1,300 constructors does with arguments or the meta device
        wanted = f"with {args}" if args else "on the meta device"
        raise UnsupportedModel(f"timm cannot build {architecture} {wanted}: {one_line(error)}") from error


def materialise(build: Callable[[], nn.Module]) -> nn.Module:
    """The model of `build` on the CPU with all parameters zero; saves the random initialisation (2 s for a ViT-B)."""
    with torch.device("meta"):
        model = build()
    if any(module._non_persistent_buffers_set for module in model.modules()):
        return build()  # such buffers are in no checkpoint: they must be computed
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.zero_()
    return model


def settle(model: nn.Module) -> nn.Module:
    """Let `pretrained_cfg`, a copy, tell the model's real number of classes and image size."""
    config = {k: v for k, v in cast(dict, model.pretrained_cfg).items() if k != "state_dict"}
    size = (3, *hosts.image_size(model))
    if tuple(config.get("input_size") or size) != size:
        for key in ("test_input_size", "min_input_size", "test_crop_pct"):
            config.pop(key, None)
    config.update(num_classes=model.num_classes, input_size=size)
    return _with_config(model, config)


def tag(source: Source) -> str | None:
    """Which of timm's weights of the architecture: its configuration is that tag's."""
    return source.pretrained_name.partition(".")[2] or None
