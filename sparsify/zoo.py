"""From a name to a dense timm model with its weights: aliases, timm names, hub names, local files and `digits`.

source = resolve("deit_small")           # what the name means; nothing is built or downloaded
graft.check(skeleton(source))            # refused by class name before anything is computed
model = load(source)                     # weights downloaded, or read from a file given by the user
header = describe(model, source)         # JSON-able; `rebuild(**header)` needs no network
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import fnmatch
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import _hub
from timm.models._pretrained import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sparsify import digits
from sparsify import weights as weights_
from sparsify.errors import BadFile, SparsifyError, UnsupportedModel, UsageError, one_line
from sparsify.hub import quick_hub
from sparsify.nn import graft, hosts

DIGITS = "digits"
ALIASES = {
    **{f"deit_{size}": f"deit_{size}_patch16_224.fb_in1k" for size in ("tiny", "small", "base")},
    **{f"deit_{size}_distilled": f"deit_{size}_distilled_patch16_224.fb_in1k" for size in ("tiny", "small", "base")},
    **{f"deit3_{size}": f"deit3_{size}_patch16_224.fb_in1k" for size in ("small", "medium", "base", "large")},
    **{f"vit_{size}": f"vit_{size}_patch16_224.augreg_in21k_ft_in1k" for size in ("tiny", "small", "large")},
    "vit_base": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    **{f"dinov2_{size}": f"vit_{size}_patch14_dinov2.lvd142m" for size in ("small", "base", "large", "giant")},
    **{f"dinov2_{size}_reg": f"vit_{size}_patch14_reg4_dinov2.lvd142m" for size in ("small", "base", "large", "giant")},
    "clip_base": "vit_base_patch16_clip_quickgelu_224.openai",
    "clip_large": "vit_large_patch14_clip_quickgelu_224.openai",
    "siglip_base": "vit_base_patch16_siglip_224.webli",
    "siglip_so400m": "vit_so400m_patch14_siglip_224.webli",
    "siglip2_base": "vit_base_patch16_siglip_224.v2_webli",
    "siglip2_so400m": "vit_so400m_patch14_siglip_224.v2_webli",
    **{f"dinov3_{size}": f"vit_{size}_patch16_dinov3.lvd1689m" for size in ("small", "base", "large")},
    "dinov3_small_plus": "vit_small_plus_patch16_dinov3.lvd1689m",
    "dinov3_huge_plus": "vit_huge_plus_patch16_dinov3.lvd1689m",
    "dinov3_7b": "vit_7b_patch16_dinov3.lvd1689m",
    **{f"eva02_{size}": f"eva02_{size}_patch14_336.mim_in22k_ft_in1k" for size in ("tiny", "small")},
    **{f"eva02_{size}": f"eva02_{size}_patch14_448.mim_in22k_ft_in22k_in1k" for size in ("base", "large")},
    **{f"eva02_clip_{size}": f"eva02_{size}_clip_224.merged2b" for size in ("base_patch16", "large_patch14")},
    **{f"beit_{size}": f"beit_{size}_patch16_224.in22k_ft_in22k_in1k" for size in ("base", "large")},
    **{f"beitv2_{size}": f"beitv2_{size}_patch16_224.in1k_ft_in22k_in1k" for size in ("base", "large")},
    **{f"pe_core_{size}": f"vit_pe_core_{size}_patch16_384.fb" for size in ("tiny", "small")},
    "pe_core_base": "vit_pe_core_base_patch16_224.fb",
    "pe_core_large": "vit_pe_core_large_patch14_336.fb",
    **{f"vit_rope_{size}": f"vit_{size}_patch16_rope_224.naver_in1k" for size in ("small", "base", "large")},
    "naflexvit_base": "naflexvit_base_patch16_gap.e300_s576_in1k",
}
_SOURCE_KEYS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")  # where weights came from


@dataclasses.dataclass(frozen=True)
class Source:
    """What a model name stands for. `note` is '' or one line that says how an alias was resolved."""

    asked: str
    architecture: str  # timm architecture without tag, or `digits.ARCHITECTURE`
    pretrained_name: str  # what the weights are called: architecture.tag, hf-hub:... , local-dir:... or digits
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)  # arguments that build it, JSON-able
    note: str = ""
    pretrained_cfg: dict[str, Any] | None = None  # from a hub's or folder's config.json; None: timm's registry


def resolve(name: str) -> Source:
    """What `name` stands for: `digits`, an alias, a timm name with or without tag, `hf-hub:...` or `local-dir:...`.

    Only the last two read anything: their config.json.

    Raises:
        UsageError: unknown name (with the nearest ones), or a path.
        SparsifyError, BadFile: the config.json cannot be downloaded or read.
    """
    if name == DIGITS:
        return Source(name, digits.ARCHITECTURE, DIGITS, dict(digits.MODEL_ARGS))
    scheme, _, place = name.partition(":")
    if scheme in ("hf-hub", "hf_hub", "local-dir") and place:
        return _resolve_hub(name, scheme.replace("_", "-"), place)
    target = ALIASES.get(name, name)
    architecture, _, tag = target.partition(".")
    if not timm.is_model(architecture):
        raise UsageError(_unknown(name))
    try:
        config = timm.get_pretrained_cfg(target)
    except RuntimeError:
        config = None
    if tag and config is None:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise UsageError(f"{architecture} has no weights tagged '{tag}'; known tags: {', '.join(tags) or 'none'}")
    if not tag and config is not None and config.tag:
        target = f"{architecture}.{config.tag}"
    return Source(name, architecture, target, note=f"{name} -> {target}" if name in ALIASES else "")


def skeleton(source: Source, num_classes: int | None = None, img_size: int | None = None) -> nn.Module:
    """The model on the meta device: shapes and classes, no weights, no memory.

    `num_classes` and `img_size` (pixels, square) override the model's own.

    Raises:
        UsageError: an image size that is not a multiple of the patch size.
        UnsupportedModel: timm cannot build it with these arguments.
    """
    if img_size is not None and img_size < 1:
        raise UsageError(f"image size {img_size}: a positive number of pixels is expected")
    if num_classes is not None and num_classes < 0:
        raise UsageError(f"number of classes {num_classes}: 0 (features) or more is expected")
    args = _args(source, num_classes, img_size)
    model = _meta(source.architecture, args, source.pretrained_cfg or _tag(source))
    patch = hosts.stride(model) if type(model) in hosts.MODELS else (1, 1)
    if img_size is not None and any(img_size % side for side in patch):
        raise UsageError(f"image size {img_size} is not a multiple of the patch size {patch[0]} of {source.asked}")
    return model


def load(
    source: Source, weights: Path | None = None, num_classes: int | None = None, img_size: int | None = None
) -> nn.Module:
    """The dense model on the CPU, float32, in eval mode, with its weights.

    Args:
        weights: local checkpoint (safetensors, or a torch file of tensors only); None downloads the source's weights.
        num_classes: outputs of the head; 0 drops the head; None takes what the weights have.
        img_size: pixels, square; position embeddings are resampled; None takes what the weights have.

    Raises:
        UsageError: a number of classes that the weights to be downloaded do not have.
        BadFile: the file cannot be read, is not a checkpoint, or does not fit the architecture.
        SparsifyError: the weights cannot be downloaded.
    """
    if weights is not None:
        model = _load_file(source, Path(weights), num_classes, img_size)
    else:
        own = skeleton(source).num_classes
        if num_classes not in (None, 0, own):
            raise UsageError(
                f"the weights of {source.pretrained_name} have {own} classes, not {num_classes}: give --weights FILE "
                "with a head of that size, or --num-classes 0 for features"
            )
        skeleton(source, num_classes, img_size)  # refuses an impossible size before anything is downloaded
        builtin = source.pretrained_name == DIGITS
        model = _load_digits(num_classes, img_size) if builtin else _download(source, num_classes, img_size)
    return _settle(model).float().eval()


def note(model: nn.Module, source: Source) -> str:
    """One line on where a loaded model differs from its architecture's default (classes, image size); '' if nowhere."""
    default = skeleton(source)
    changes = []
    if model.num_classes != default.num_classes:
        changes.append(f"{model.num_classes} classes instead of {default.num_classes}")
    if _side(model) != _side(default):
        changes.append("{}x{} px instead of {}x{}".format(*_side(model), *_side(default)))
    return f"{source.architecture} with {' and '.join(changes)}" if changes else ""


def describe(model: nn.Module, source: Source) -> dict[str, Any]:
    """JSON-able `architecture`, `model_args` and `pretrained_cfg` (preprocessing, licence, classifier) for `rebuild`.

    Places of weights (URLs, local paths) are left out: they would go stale, or tell about the user's machine.
    """
    kept = {k: v for k, v in cast(dict, model.pretrained_cfg).items() if k not in _SOURCE_KEYS and v is not None}
    args = {**source.model_args, "num_classes": model.num_classes, "img_size": _side(model)}
    return json.loads(json.dumps({"architecture": source.architecture, "model_args": args, "pretrained_cfg": kept}))


def rebuild(architecture: str, model_args: dict[str, Any], pretrained_cfg: dict[str, Any]) -> nn.Module:
    """The dense model that `describe` described: CPU, float32, eval mode, every parameter zero; no network.

    Raises:
        BadFile: an architecture that this timm does not have, or arguments it does not take.
    """
    if architecture != digits.ARCHITECTURE and not timm.is_model(architecture):
        raise BadFile(f"architecture {architecture} is not in timm {timm.__version__}: a newer timm may have it")
    known = {field.name for field in dataclasses.fields(PretrainedCfg)} - set(_SOURCE_KEYS)
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in pretrained_cfg.items() if k in known}
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in model_args.items()}
    try:
        return _settle(_materialise(lambda: _build(architecture, args, config))).eval()
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError, KeyError) as error:
        raise BadFile(f"{architecture} cannot be built with the arguments in the file: {one_line(error)}") from error


def listing(pattern: str = "") -> list[tuple[str, str]]:
    """Models that can be converted, as (name, note): `digits`, aliases, timm architectures.

    `pattern` is a part of the name, or a shell pattern (`vit_*dinov2*`). Each architecture is really checked, on the
    meta device and one block deep (its blocks are alike): 292 architectures in 8 s.
    """
    wanted = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    tags: dict[str, list[str]] = {}
    for name in timm.list_pretrained():
        architecture, _, tag = name.partition(".")
        tags.setdefault(architecture, []).append(tag)
    rows = [(DIGITS, "built in: 28 px, 197 tokens, 10 classes; weights and data come with the package")]
    rows += [(alias, f"-> {target}") for alias, target in ALIASES.items()]
    rows = [row for row in rows if fnmatch.fnmatch(row[0], wanted)]
    for architecture in architectures():
        if fnmatch.fnmatch(architecture, wanted):
            try:
                graft.check(shallow(architecture), architecture)
            except UnsupportedModel:
                continue
            known = tags.get(architecture)
            rows.append((architecture, f"weights: {', '.join(known)}" if known else "no weights: give --weights FILE"))
    return rows


def architectures() -> list[str]:
    """timm's names in the modules that hold models that can be converted; a few of them cannot."""
    return sorted({name for module in hosts.MODULES for name in timm.list_models(module=module)})


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


# building


def _build(architecture: str, args: dict[str, Any], config: dict[str, Any] | str | None) -> nn.Module:
    if architecture != digits.ARCHITECTURE:
        return _sized(timm.create_model(architecture, pretrained=False, pretrained_cfg=config, **args), args)
    model = VisionTransformer(**args)
    return _with_config(model, config if isinstance(config, dict) else digits.DATA_CONFIG)


def _sized(model: nn.Module, args: dict[str, Any]) -> nn.Module:
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


def _args(source: Source, num_classes: int | None, img_size: int | None) -> dict[str, Any]:
    asked = {"num_classes": num_classes, "img_size": img_size}
    return {**source.model_args, **{k: v for k, v in asked.items() if v is not None}}


def _meta(architecture: str, args: dict[str, Any], config: dict[str, Any] | str | None) -> nn.Module:
    try:
        with torch.device("meta"):
            return _build(architecture, args, config)
    except Exception as error:  # whatever one of timm's 1,300 constructors does with arguments or the meta device
        wanted = f"with {args}" if args else "on the meta device"
        raise UnsupportedModel(f"timm cannot build {architecture} {wanted}: {one_line(error)}") from error


def _materialise(build: Callable[[], nn.Module]) -> nn.Module:
    """The model of `build` on the CPU with all parameters zero; saves the random initialisation (2 s for a ViT-B)."""
    with torch.device("meta"):
        model = build()
    if any(module._non_persistent_buffers_set for module in model.modules()):
        return build()  # such buffers are in no checkpoint: they must be computed
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.zero_()
    return model


def _settle(model: nn.Module) -> nn.Module:
    """Let `pretrained_cfg`, a copy, tell the model's real number of classes and image size."""
    config = {k: v for k, v in cast(dict, model.pretrained_cfg).items() if k != "state_dict"}
    size = (3, *_side(model))
    if tuple(config.get("input_size") or size) != size:
        for key in ("test_input_size", "min_input_size", "test_crop_pct"):
            config.pop(key, None)
    config.update(num_classes=model.num_classes, input_size=size)
    return _with_config(model, config)


def _side(model: nn.Module) -> tuple[int, int]:
    return hosts.image_size(model)


def _tag(source: Source) -> str | None:
    return source.pretrained_name.partition(".")[2] or None


# weights that come with the package, from a hub, from a folder


def _load_digits(num_classes: int | None, img_size: int | None) -> nn.Module:
    model = digits.build(pretrained=True)
    if num_classes == 0:
        model.reset_classifier(0)
    if img_size is not None:
        model.set_input_size(img_size=(img_size, img_size))
    return model


def _resolve_hub(name: str, scheme: str, place: str) -> Source:
    try:
        if scheme == "local-dir":
            config, architecture, args = _hub.load_model_config_from_path(place)
        else:
            with quick_hub():
                config, architecture, args = _hub.load_model_config_from_hf(place)
    except Exception as error:
        if scheme == "local-dir":
            raise BadFile(f"{place} is not a model folder (config.json and weights): {one_line(error)}") from error
        raise SparsifyError(_no_download(f"the configuration of {name}", error)) from error
    if architecture == "sparsify_vit":
        raise BadFile(f"{name} is sparse already: sparsify.load('{name}') loads it, and it is not converted again")
    if not timm.is_model(architecture):
        raise BadFile(f"{name} is a '{architecture}', which is not in timm {timm.__version__}")
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
    return Source(name, architecture, f"{scheme}:{place}", dict(args or {}), f"{name} is a {architecture}", config)


def _download(source: Source, num_classes: int | None, img_size: int | None) -> nn.Module:
    args = _args(source, num_classes, img_size)
    config = copy.deepcopy(source.pretrained_cfg) or _tag(source)
    local = source.pretrained_name.startswith("local-dir:")
    try:
        with contextlib.nullcontext() if local else quick_hub():
            return _sized(timm.create_model(source.architecture, pretrained=True, pretrained_cfg=config, **args), args)
    except Exception as error:
        text = one_line(error)
        if "No pretrained weights exist" in text or "Invalid pretrained config" in text:
            raise UsageError(f"timm has no pretrained weights for {source.asked}: give --weights FILE") from error
        if local or "Error(s) in loading state_dict" in text:
            raise BadFile(f"the weights of {source.pretrained_name} cannot be loaded: {text}") from error
        raise SparsifyError(_no_download(f"the weights of {source.pretrained_name}", error)) from error


def _no_download(what: str, error: BaseException) -> str:
    reason = f"{type(error).__name__}: {one_line(error, 120)}"
    return f"{what} could not be downloaded ({reason}); give --weights FILE, or a folder as local-dir:FOLDER"


# weights from a file


def _load_file(source: Source, path: Path, num_classes: int | None, img_size: int | None) -> nn.Module:
    """Strict, apart from what can be read off the file: size of the head, and number of patches."""
    state = weights_.read_checkpoint(path)
    frame = skeleton(source, num_classes, img_size)
    if type(frame) not in hosts.MODELS:
        raise UnsupportedModel(f"{source.asked}: model class {type(frame).__name__} is not understood")
    patch = tuple(cast(Any, hosts.embedding(frame)).patch_size)
    stem = state.get("patch_embed.proj.weight")
    if stem is not None and stem.ndim == 4 and tuple(stem.shape[2:]) != patch:
        raise BadFile(f"{path} has patches of {stem.shape[2]} px, {source.architecture} of {patch[0]} px")
    if img_size is None:
        img_size = weights_.image_side(state, frame)
    frame = skeleton(source, num_classes, img_size)
    try:
        state = weights_.original_format(source.architecture)(state, frame)
    except Exception as error:  # the filter meets another architecture's tensors
        raise BadFile(f"{path} does not fit {source.architecture}: {one_line(error)}") from error
    classifier = cast(dict, frame.pretrained_cfg).get("classifier") or "head"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    rows = state[f"{heads[0]}.weight"].shape[0] if f"{heads[0]}.weight" in state else None
    if num_classes is None:
        num_classes = rows if rows is not None else int(cast(Any, frame).num_classes)
    elif num_classes == 0:
        state = {k: v for k, v in state.items() if k.rpartition(".")[0] not in heads}
    elif rows is not None and rows != num_classes:
        raise BadFile(f"the head in {path} has {rows} classes, not {num_classes}")
    config = copy.deepcopy(source.pretrained_cfg) or _tag(source)
    args = {**source.model_args, "num_classes": num_classes, "img_size": img_size or _side(frame)}
    model = _materialise(lambda: _build(source.architecture, args, config))
    weights_.check_keys(state, model, path, source.architecture, bool(num_classes) and rows is None)
    model.load_state_dict(state)
    return model


def _unknown(name: str) -> str:
    path = Path(name)
    if path.is_dir():
        return f"'{name}' is a folder, not a model name: give it as local-dir:{name}"
    if path.is_file() or path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt"):
        return f"'{name}' is a file, not a model name: give the name of its architecture and --weights {name}"
    if "/" in name or "\\" in name:
        return f"'{name}' is not a model name: give hf-hub:OWNER/NAME, local-dir:FOLDER, or a name and --weights FILE"
    near = difflib.get_close_matches(name, [*ALIASES, DIGITS, *timm.list_models()], n=3, cutoff=0.3)
    return f"unknown model '{name}'; nearest: {', '.join(near) or 'none'} (see 'sparsify models')"
