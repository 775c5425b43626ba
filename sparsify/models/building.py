"""Dense models without their weights, on the meta device or of zeros; their description as JSON, and back.

The names of the models that can be converted (`listing`) are found by building each.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
from collections.abc import Callable, Iterator
from typing import Any, cast

import timm
import torch
from timm.layers import RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sparsify.errors import BadFile, UnsupportedModel, UsageError, field, one_line
from sparsify.models.digits import network
from sparsify.models.names import ALIASES, DIGITS, Source, known_config, tuples
from sparsify.models.timm_arguments import CLS_AND_MEAN, NORM_EPS
from sparsify.nn import hosts
from sparsify.nn.pooling import TokenAndMean

_WEIGHTS_KEYS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")  # where weights came from


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """New tensors are float32, whatever the caller made torch's default: weights would be rounded to it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def skeleton(source: Source, num_classes: int | None = None, img_size: int | None = None) -> nn.Module:
    """The model on the meta device: modules and shapes, no memory.

    Args:
        num_classes: outputs of the head, 0 for features; None: the model's own.
        img_size: pixels, square; None: the model's own.

    Raises:
        UsageError: a negative number of classes, or an image size that is not a positive multiple of the patch size.
        UnsupportedModel: timm cannot build it with these arguments.
    """
    if num_classes is not None and num_classes < 0:
        raise UsageError(f"number of classes {num_classes}: 0 (features) or more is expected")
    if img_size is not None and img_size < 1:
        raise UsageError(f"image size {img_size}: a positive number of pixels is expected")
    args = arguments(source, num_classes, img_size)
    config = source.pretrained_cfg or tag(source)
    if img_size is not None:
        own = _meta(source.architecture, arguments(source, num_classes, None), config)
        if type(own) in hosts.MODELS:
            hosts.check_image_size(own, img_size, img_size, source.asked)
    return _meta(source.architecture, args, config)


def shallow(architecture: str, **arguments: Any) -> nn.Module:
    """An architecture on the meta device, one block deep; `UnsupportedModel` where timm cannot build it so."""
    try:
        return _meta(architecture, {"depth": 1, **arguments}, None)
    except UnsupportedModel as error:
        if "num_kv_heads" not in str(error):
            raise
    return _meta(architecture, {"depth": 1, "num_kv_heads": (1,), **arguments}, None)  # it lists one for each block


def note(model: nn.Module, source: Source) -> str:
    """One line on classes and image size of a loaded model that are not its architecture's default; '' if both are."""
    default = skeleton(source)
    changes = []
    if model.num_classes != default.num_classes:
        changes.append(f"{model.num_classes} classes instead of {default.num_classes}")
    if hosts.image_size(model) != hosts.image_size(default):
        changes.append("{}x{} px instead of {}x{}".format(*hosts.image_size(model), *hosts.image_size(default)))
    return f"{source.architecture} with {' and '.join(changes)}" if changes else ""


def describe(model: nn.Module, source: Source) -> dict[str, Any]:
    """JSON-able `architecture`, `model_args` and `pretrained_cfg` (preprocessing, licence, classifier) for `described`.

    Where weights came from (URLs, local paths) is left out: it would go stale, or tell about the user's machine.
    """
    config = {k: v for k, v in cast(dict, model.pretrained_cfg).items() if k not in _WEIGHTS_KEYS and v is not None}
    args = {**source.model_args, "num_classes": model.num_classes, "img_size": hosts.image_size(model)}
    return json.loads(json.dumps({"architecture": source.architecture, "model_args": args, "pretrained_cfg": config}))


def described(architecture: str, model_args: dict[str, Any], pretrained_cfg: dict[str, Any]) -> nn.Module:
    """The dense model that `describe` described, with random weights; no network.

    Raises:
        BadFile: an architecture that this timm does not have (`check_name`), or arguments that it does not take.
    """
    check_name(architecture)
    config = {k: v for k, v in known_config(pretrained_cfg).items() if k not in _WEIGHTS_KEYS}
    try:
        return with_true_config(build(architecture, tuples(model_args), config))
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError, KeyError) as error:
        raise BadFile(f"{architecture} cannot be built with the arguments in the file: {one_line(error)}") from error


def check_name(architecture: str) -> None:
    """Raise `BadFile` for an architecture that timm does not have, or whose module holds none that can be converted."""
    if architecture == network.ARCHITECTURE:
        return
    if not timm.is_model(architecture):
        raise BadFile(f"architecture {architecture} is not in timm {timm.__version__}: a newer timm may have it")
    package, _, module = timm.model_entrypoint(architecture).__module__.rpartition(".")
    if package.startswith(("timm", "sparsify")) and module not in hosts.MODULES:
        raise BadFile(f"architecture {architecture} is none that can be converted")


def build(architecture: str, args: dict[str, Any], config: dict[str, Any] | str | None) -> nn.Module:
    """timm's model, or that of `digits`, with random weights; `config`: a `pretrained_cfg`, its tag, or None, timm's own.

    `UnsupportedModel`: images of other than 3 channels.
    """
    if (channels := args.get("in_chans", 3)) != 3:
        raise UnsupportedModel(f"{architecture} with {channels} input channels: images of 3 (RGB) are expected")
    if architecture != network.ARCHITECTURE:
        return completed(timm.create_model(architecture, pretrained=False, pretrained_cfg=config, **timms(args)), args)
    model = VisionTransformer(**args)
    return _with_config(model, config if isinstance(config, dict) else network.DATA_CONFIG)


def timms(args: dict[str, Any]) -> dict[str, Any]:
    """What of `args` timm takes; `completed` sees to the rest."""
    return {name: value for name, value in args.items() if name not in (NORM_EPS, CLS_AND_MEAN)}


def completed(model: nn.Module, args: dict[str, Any]) -> nn.Module:
    """The model with what of `args` its constructor does not take, in place: the image size of a NaFlexVit, and

    `NORM_EPS`: of all norms.
    `CLS_AND_MEAN`: whether a VisionTransformer's classifier reads the cls token beside the mean of the patches.
    """
    if args.get(NORM_EPS) is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | RmsNorm):
                module.eps = args[NORM_EPS]
    if args.get(CLS_AND_MEAN) and isinstance(model, VisionTransformer) and model.num_classes:
        host = cast(Any, model)
        host.attn_pool, host.pool_include_prefix = TokenAndMean(host.num_prefix_tokens), True
        host.head = nn.Linear(2 * host.embed_dim, host.num_classes)
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


def arguments(source: Source, num_classes: int | None, img_size: int | None) -> dict[str, Any]:
    """The arguments that build the model of `source` with these classes and this image size; see `skeleton`."""
    changes = {"num_classes": num_classes, "img_size": img_size}
    return {**source.model_args, **{k: v for k, v in changes.items() if v is not None}}


def _meta(architecture: str, args: dict[str, Any], config: dict[str, Any] | str | None) -> nn.Module:
    try:
        with torch.device("meta"):
            return build(architecture, args, config)
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever one of timm's 1,300 constructors does with arguments or the meta device
        how = f"with {args}" if args else "on the meta device"
        raise UnsupportedModel(f"timm cannot build {architecture} {how}: {one_line(error)}") from error


def materialise(build: Callable[[], nn.Module], frame: nn.Module | None = None) -> nn.Module:
    """The model of `build` on the CPU, all parameters zero: it skips the random initialisation (2 s for a ViT-B).

    `frame`: what `build` gave on the meta device, if it has been called; it is used up.
    """
    model = frame
    if model is None:
        with torch.device("meta"):
            model = build()
    if any(module._non_persistent_buffers_set for module in model.modules()):
        return build()  # such buffers are not in checkpoints: they must be computed
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.zero_()
    return model


def with_true_config(model: nn.Module) -> nn.Module:
    """The model with a `pretrained_cfg`, a copy, that states its real number of classes and image size."""
    config = {k: v for k, v in cast(dict, model.pretrained_cfg).items() if k != "state_dict"}
    size = (3, *hosts.image_size(model))
    if tuple(config.get("input_size") or size) != size:
        for key in ("test_input_size", "min_input_size", "test_crop_pct"):
            config.pop(key, None)
    if len(config.get("label_names") or ()) != model.num_classes:
        config.pop("label_names", None)
    config.update(num_classes=model.num_classes, input_size=size)
    return _with_config(model, config)


def tag(source: Source) -> str | None:
    """The tag of timm's weights, by which timm finds the `pretrained_cfg`; None where there is none."""
    return source.pretrained_name.partition(".")[2] or None


def listing(pattern: str = "") -> list[tuple[str, str]]:
    """Models that can be converted, as (name, note): `digits`, aliases, timm architectures.

    `pattern` is a part of the name, or a shell pattern (`vit_*dinov2*`). Each architecture is built on the meta device,
    one block deep (its blocks are alike), and checked: 292 architectures in 8 s. A note may hold marked fields.
    """
    pattern = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    tags: dict[str, list[str]] = {}
    for name in timm.list_pretrained():
        architecture, _, known = name.partition(".")
        tags.setdefault(architecture, []).append(known)
    rows = [(DIGITS, "built in: 28 px, 197 tokens, 10 classes; weights and data come with the package")]
    rows += [(alias, f"-> {target}") for alias, target in ALIASES.items()]
    rows = [row for row in rows if fnmatch.fnmatch(row[0], pattern)]
    names = {name for module in hosts.MODULES for name in timm.list_models(module=module)}  # a few cannot be converted
    for architecture in sorted(names):
        if fnmatch.fnmatch(architecture, pattern):
            try:
                hosts.supported_attentions(shallow(architecture), architecture)
            except UnsupportedModel:
                continue
            none = f"no weights: give {field('weights')} FILE"
            rows.append((architecture, f"weights: {', '.join(tags[architecture])}" if architecture in tags else none))
    return rows
