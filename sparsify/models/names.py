"""What the name of a dense model stands for: an alias, timm's names, `digits`, the hub, a folder. Nothing is built here."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import timm
from timm.models import _hub
from timm.models._pretrained import PretrainedCfg

from sparsify.errors import BadFile, SparsifyError, UsageError, field, one_line
from sparsify.files.plain_json import read_json
from sparsify.models import shards
from sparsify.models.digits import network
from sparsify.models.header import check_source
from sparsify.models.hub import ARCHITECTURE, CHECKPOINTS, CONFIG, fetch, is_name, quick_hub
from sparsify.models.huggingface import configs, preprocessor

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


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What is known of a checkpoint of Hugging Face transformers."""

    model_type: str
    config: dict[str, Any] | None = None  # its config.json; None: a file alone, whose architecture is known
    preprocessor: dict[str, Any] | None = None
    kind: str = ""  # of `huggingface.families.HEADS`


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a dense model comes from."""

    asked: str  # the name as the user gave it; of a repository or folder with its scheme
    architecture: str  # timm's, without tag, or `network.ARCHITECTURE`
    pretrained_name: str  # of the weights: architecture.tag, hf-hub:..., local-dir:... or digits
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)  # build the architecture; JSON-able
    note: str = ""  # one line on what an alias or a hub's name is, or ''
    pretrained_cfg: dict[str, Any] | None = None  # from the config.json of a hub or folder; None: timm's own
    read_here: bool = False  # the weights are in a form that timm does not read (transformers', shards)
    foreign: Foreign | None = None  # of a checkpoint of Hugging Face transformers


def resolve(name: str) -> Source:
    """What `name` stands for: `digits`, an alias, a timm name with or without tag, a repository of the hub or a folder.

    A repository is ORG/NAME or hf-hub:ORG/NAME, a folder its path or local-dir:PATH. Their config.json is read, in timm's
    form or in that of Hugging Face transformers.

    Raises:
        UsageError: unknown name (with the nearest ones), or a path.
        SparsifyError, BadFile: the config.json cannot be downloaded or read.
    """
    if name == DIGITS:
        return Source(name, network.ARCHITECTURE, DIGITS, dict(network.MODEL_ARGS))
    scheme, _, location = name.partition(":")
    if scheme in ("hf-hub", "hf_hub", "local-dir") and location:
        return _resolve_repository(name, scheme.replace("_", "-"), location)
    target = ALIASES.get(name, name)
    architecture, _, tag = target.partition(".")
    if not timm.is_model(architecture):
        if os.path.isfile(Path(name) / CONFIG):
            return _resolve_repository(f"local-dir:{name}", "local-dir", name)
        if is_name(name) and not name.endswith(CHECKPOINTS) and not os.path.exists(name):
            return _resolve_repository(f"hf-hub:{name}", "hf-hub", name)
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


def _resolve_repository(name: str, scheme: str, location: str) -> Source:
    """The model of a repository of the hub, or of a folder like one."""
    try:
        if scheme == "local-dir":
            config, architecture, args = _hub.load_model_config_from_path(location)
        else:
            with quick_hub():
                config, architecture, args = _hub.load_model_config_from_hf(location)
    except KeyError:
        return _of_transformers(name, scheme, location)
    except Exception as error:
        if scheme == "local-dir":
            raise BadFile(f"{location} is not a model folder (config.json and weights): {one_line(error)}") from error
        raise SparsifyError(not_downloaded(f"the configuration of {name}", error)) from error
    if architecture == ARCHITECTURE:
        raise BadFile(f"{name} is sparse already: sparsify.load('{name}') loads it, and it is not converted again")
    if not timm.is_model(architecture):
        raise BadFile(f"{name} is a '{architecture}', which is not in timm {timm.__version__}")
    _check(name, args or {}, known_config(config))
    note = f"{name} is a {architecture}"
    path = beside(scheme, location, CONFIG)
    wrapped = path is not None and read_json(path).get("model_type") == "timm_wrapper"  # timm's, saved by transformers
    here = wrapped or (scheme == "local-dir" and shards.only(Path(location)))
    return Source(name, architecture, f"{scheme}:{location}", dict(args or {}), note, known_config(config), here)


def _of_transformers(name: str, scheme: str, location: str) -> Source:
    """The model of a config.json without timm's `architecture`, which is one of Hugging Face transformers."""
    config = read_json(Path(location) / CONFIG if scheme == "local-dir" else fetch(location, CONFIG))
    if config.get("model_type") is None:
        raise BadFile(
            f"{name}: its config.json names neither timm's 'architecture' nor the 'model_type' of transformers"
        )
    found = (beside(scheme, location, file) for file in preprocessor.FILES)
    pixels = next((read_json(path) for path in found if path is not None), None)
    foreign = Foreign(config["model_type"], config, pixels)
    source = Source(name, "", f"{scheme}:{location}", read_here=True, foreign=foreign)
    return of_kind(source, None)


def of_kind(source: Source, kind: str | None) -> Source:
    """`source`, a checkpoint of transformers with its config.json, as timm's model with a head of `kind`; None: its own.

    `BadFile`: one that is not understood.
    """
    foreign = source.foreign
    if foreign is None or foreign.config is None or kind == foreign.kind:
        return source
    try:
        found = configs.describe(foreign.config, foreign.preprocessor, kind)
    except UsageError as error:
        raise BadFile(
            f"{source.asked} is {error}" if str(error).startswith("a ") else f"{source.asked}: {error}"
        ) from None
    config = known_config(found.pretrained_cfg)
    _check(source.asked, found.model_args, config)
    return dataclasses.replace(
        source,
        architecture=found.architecture,
        model_args=found.model_args,
        pretrained_cfg=config,
        note=f"{source.asked} is {found.words}",
        foreign=dataclasses.replace(foreign, kind=found.kind),
    )


def beside(scheme: str, location: str, file: str) -> Path | None:
    """A file of a folder or of a repository of the hub; None: there is none."""
    if scheme == "local-dir":
        path = Path(location) / file
        return path if path.is_file() else None
    try:
        return fetch(location, file)
    except SparsifyError:
        return None


def _check(name: str, args: Any, config: Any) -> None:
    try:
        check_source(args, config)
    except UsageError as error:
        wrong = f"the config.json of {name} does not describe an architecture and its preprocessing"
        raise BadFile(f"{wrong} ({error})") from None


def known_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a JSON `config` is a field of timm's `PretrainedCfg`."""
    known = {each.name for each in dataclasses.fields(PretrainedCfg)}
    return {key: value for key, value in tuples(config).items() if key in known}


def tuples(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping read from JSON with tuples, which timm expects, instead of lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}


def not_downloaded(what: str, error: BaseException) -> str:
    """The message for a download that failed, with what to give instead."""
    reason = f"{type(error).__name__}: {one_line(error, 120)}"
    return f"{what} could not be downloaded ({reason}); give {field('weights')} FILE, or a model's folder"


def _unknown(name: str) -> str:
    path, weights = Path(name), field("weights")
    if os.path.isdir(path):
        return f"'{name}' is a folder without {CONFIG}: a folder of a model has that beside its weights"
    if os.path.isfile(path) or path.suffix in CHECKPOINTS:
        return f"'{name}' is a file, not a model name: give the name of its architecture and {weights} {name}"
    if "/" in name or "\\" in name:
        return (
            f"'{name}' is not a model name: give OWNER/NAME of the hub, a model's folder, or a name and {weights} FILE"
        )
    listed = (resources.files("sparsify.models") / "names.txt").read_text(encoding="utf-8").split()
    known = [each for each in listed if each in (*ALIASES, DIGITS) or timm.is_model(each)]  # older timms have fewer
    near = difflib.get_close_matches(name[:80], known, n=3, cutoff=0.3)
    return f"unknown model '{name}'; nearest: {', '.join(near) or 'none'} (see 'sparsify models')"
