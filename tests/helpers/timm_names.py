"""Which of timm's models convert: small builds of every name, what tells their kinds apart, and docs/families.md.

small(name)        the architecture one block deep, narrow, on a grid of 4x4 patches, with attention that is uneven
frame(name)        the same on the meta device, as wide as it is; or why it is refused, in the words of the tool
difference(model)  how far keep=1 through the sparse op is from the dense model
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections import Counter, defaultdict
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from torch import nn

from helpers.families import images, raise_attention
from sparsify.config import SparsityConfig
from sparsify.errors import UnsupportedModel
from sparsify.fit.calibrate.calibrate import calibrate
from sparsify.models import building
from sparsify.models.building import shallow
from sparsify.nn import hosts
from sparsify.nn.attention import sparse_modules

SHALLOW = {"depth": 1, "num_classes": 5}
NARROW = ({"embed_dim": 64, "num_heads": 2, **SHALLOW}, {"embed_dim": 96, "num_heads": 3, **SHALLOW}, SHALLOW)
TOLERANCE = 1e-4


MEASURED = (
    "`make bench-families`, timm 1.0.31, torch 2.15: 283 of 283 equal dense at keep=1, largest "
    "difference of a feature or logit 4.5e-6, both predictors. timm's other 1088 names, built at full size on the meta "
    "device, are all refused."
)


def names() -> dict[str, list[str]]:
    """timm's names by module, of the modules that hold models that can be converted."""
    return {module: timm.list_models(module=module) for module in hosts.MODULES}


@functools.cache
def frame(name: str) -> nn.Module | str:
    """`name` on the meta device, one block deep; or why it is refused, after the name."""
    try:
        model = shallow(name)
        hosts.supported_attentions(model, name)
    except UnsupportedModel as error:
        return str(error).removeprefix(f"{name}: ").removesuffix(" (see 'sparsify models')")
    return model


def small(name: str) -> nn.Module:
    """`name` one block deep and narrow, in eval mode, with random weights that attend unevenly."""
    own = frame(name)
    assert isinstance(own, nn.Module)
    pixels, more = 4 * hosts.stride(own)[0], {}
    attention = own.blocks[0].attn
    if getattr(attention, "num_kv_groups", 1) > 1 or "sapiens2" in name:
        more["num_kv_heads"] = (1,)
    if getattr(own, "attn_pool", None) is not None and isinstance(own, Eva | NaFlexVit):
        more["attn_pool_num_heads"] = 2
    for narrow in NARROW:
        torch.manual_seed(0)
        with contextlib.suppress(AssertionError):  # some sizes do not divide, or are those of convolutions before
            model = raise_attention(building.build(name, {**narrow, "img_size": pixels, **more}, None).eval())
            if isinstance(model.head, nn.Linear):
                nn.init.normal_(model.head.weight, std=model.head.in_features**-0.5)  # some start at 0
            return model
    raise AssertionError(f"{name} cannot be built small")


def structure(model: nn.Module) -> tuple[Any, ...]:
    """What tells kinds of models apart: classes of the model and of all its modules, parameters, pools, embeddings."""
    modules = tuple((name, type(module).__name__) for name, module in model.named_modules() if "backbone" not in name)
    parameters = tuple(name for name, _ in model.named_parameters() if "backbone" not in name)
    constants = (model.global_pool, hosts.num_prefix_tokens(model), getattr(model, "no_embed_class", None))
    heads = (getattr(model.blocks[0].attn, "rotate_half", None), getattr(model.blocks[0].attn, "num_kv_groups", 1))
    return type(model).__name__, modules, parameters, constants, heads, bool(getattr(model, "dynamic_img_size", False))


def difference(dense: nn.Module, predictor: str = "head-lowrank") -> float:
    """Largest difference of an output, keep=1 through predictor, selection and sparse op, from the dense model's."""
    model, x = copy.deepcopy(dense), images(dense)
    config = SparsityConfig(keep=1.0, rank=4, cells=(2, 2), predictor=predictor, spread="none")
    calibrate(model, config, lambda: [x])
    assert len(sparse_modules(model)) == len(dense.blocks)
    with torch.inference_mode():
        expected = outputs(dense, x)
        assert all(t.abs().max() > 1e-3 for t in expected)  # something comes out
        return max(float((a - b).abs().max()) for a, b in zip(outputs(model, x), expected, strict=True))


def reaches_the_output(dense: nn.Module) -> bool:
    """Whether dropping most keys changes the features: otherwise equality at keep=1 would show nothing."""
    model, x = copy.deepcopy(dense), images(dense)
    calibrate(model, SparsityConfig(keep=0.1, rank=4, tail="none", spread="none"), lambda: [x])
    with torch.inference_mode():
        return float((outputs(model, x)[0] - outputs(dense, x)[0]).abs().max()) > 10 * TOLERANCE


def outputs(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of all tokens, of which only those of prefix tokens attend densely, and logits."""
    return model.forward_features(x), model(x)


# docs/families.md


def kind(model: nn.Module) -> str:
    """A line for people: the classes that decide how a model is converted."""
    block = model.blocks[0]
    attention = type(block.attn).__name__
    words = [f"{type(model).__name__} / {type(block).__name__} / {attention}"]
    if hosts.rotary(model):
        words.append(f"{type(model.rope).__name__.removeprefix('RotaryEmbedding')} rope")
    if hosts.biased(model):
        words.append("position biases")
    if getattr(block.attn, "qkv", None) is None:
        words.append("separate projections")
    if getattr(block.attn, "num_kv_groups", 1) > 1:
        words.append("fewer key heads")
    if not isinstance(getattr(block.attn, "q_norm", None), nn.Identity | type(None)):
        words.append("q/k norms")
    if type(hosts.embedding(model)).__name__ == "HybridEmbed":
        words.append("convolutions first")
    return ", ".join(words)


def table() -> str:
    """docs/families.md, from the classes that timm builds."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    refused: dict[str, list[str]] = defaultdict(list)
    exempt: list[str] = []
    counts: Counter[str] = Counter()
    for module, listed in names().items():
        for name in listed:
            counts[module] += 1
            model = frame(name)
            if isinstance(model, str):
                refused[model].append(name)
                if re.search("Parallel|Diff", model):
                    exempt.append(name)
            else:
                found[module][kind(model)].append(name)
    converted = sum(len(each) for kinds in found.values() for each in kinds.values())
    total, rest = counts.total(), counts.total() - len(exempt)
    lines = [
        "# Which models convert",
        "",
        f"Of the {total} architectures in timm {timm.__version__}'s modules {', '.join(hosts.MODULES)}, **{converted} "
        f"convert and {total - converted} are refused**; {len(exempt)} of the refused have blocks with parallel or "
        f"differential attention. Of the other {rest}, {converted} convert ({100 * converted / rest:.0f} %). `sparsify "
        "models` lists those of the installed timm.",
        "",
        "`make families` writes this page. `make bench-families` builds each architecture small (one block, 64 channels, "
        "4x4 patches) and compares keep=1, computed by predictor, selection and sparse op, with the dense model: they "
        "agree within 1e-4 for every name. `tests/models/test_every_name.py` does the same for one model of each "
        "structure, and checks every name's classes against this page.",
        "",
        MEASURED,
        "",
        "| timm module | names | convert | refused |",
        "|---|---|---|---|",
    ]
    for module in hosts.MODULES:
        own = sum(map(len, found[module].values()))
        lines.append(f"| {module} | {counts[module]} | {own} | {counts[module] - own} |")
    for module in hosts.MODULES:
        lines += ["", f"## {module}", "", "| model / block / attention | names | |", "|---|---|---|"]
        for words, each in sorted(found[module].items(), key=lambda pair: -len(pair[1])):
            lines.append(f"| {words} | {len(each)} | {', '.join(sorted(each))} |")
    lines += ["", "## Refused", "", "| reason | names | |", "|---|---|---|"]
    for reason, each in sorted(refused.items(), key=lambda pair: -len(pair[1])):
        lines.append(f"| {reason} | {len(each)} | {', '.join(sorted(each))} |")
    lines += [
        "",
        "All other timm models are refused before anything is downloaded, and the error names the attention or model "
        "class: window attention (swin, SAM, hiera, maxvit ...), attention across channels (xcit), class attention (cait), "
        "relative position modules (vit_relpos), convolutional hybrids (levit, mobilevit, coat ...).",
        "",
        "## Differences between families",
        "",
        "| | folded into the projection | fewer tokens | another image size | CPU kernels |",
        "|---|---|---|---|---|",
        "| VisionTransformer, DeiT, hybrid | yes, without q/k norms | yes | yes | yes |",
        "| Eva with rope (eva02, dinov3, perception encoder, vit rope, sapiens2) | no: the rotation comes between | yes: a "
        "merged token keeps the position of the token that the others were merged into | yes | yes |",
        "| Eva without rope | yes | yes | yes | yes |",
        "| Beit | yes | yes: biases of the remaining positions | yes, if timm has `set_input_size` for it | no: the "
        "position biases are a mask, which the PyTorch reference computes |",
        "| NaFlexVit | yes, without rope | no | yes; token-lowrank predictors work at one size | images: yes; patches with "
        "masks: the reference |",
        "",
    ]
    return "\n".join(lines)
