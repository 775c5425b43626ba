"""Model files: small valid ones with something drawn changed, and the digest made anew in most cases.

A file that `load` accepts must pass every command afterwards; the slow ones see a part of the files.
"""

from __future__ import annotations

import copy
import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from fuzz.harness import EXPORT, SECONDS, Case, Fault, command
from sparsify.config import SparsityConfig, Tokens
from sparsify.errors import SparsifyError
from sparsify.models import building, checkpoint, header
from sparsify.models.names import Source
from sparsify.nn import graft, schedules
from sparsify.nn.adaptive import adaptive

SUITE, MANY = 80, 5000
SLOW = ("profile", "report", "show", "export")  # commands, of which a file passes one
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
HOSTS: tuple[tuple[Any, ...], ...] = (
    ("vit_tiny_patch16_224", SMALL, SparsityConfig(keep=0.3, rank=4)),
    (
        "vit_tiny_patch16_224",
        SMALL,
        SparsityConfig(keep=("dense", 0.5), rank=4, cells=(2, 2), fold=False),
        SparsityConfig(keep=0.3, rank=8, cells=(2, 1), fold=False, tokens=Tokens(keep=(0.5, 1.0))),
    ),
    ("deit_tiny_distilled_patch16_224", SMALL, SparsityConfig(keep=0.3, rank=4, tokens=Tokens(keep=0.7, stages=(1,)))),
    ("eva02_tiny_patch14_224", SMALL, SparsityConfig(keep=("dense", 0.5), rank=4, predictor="token-lowrank")),
    ("beit_base_patch16_224", SMALL, SparsityConfig(keep=0.5, rank=4, tail="cells")),
)
PROVENANCE = {
    "source": "vit_tiny_patch16_224", "weights": None, "dense_sha256": "0" * 64, "backbone_changed": False,
    "recipe": {"description": "drawn", "seed": 0, "stages": [{"name": "distill", "steps": 3}]},
    "calibration": {"images": 8, "set": "user"}, "date": "2025-01-01T00:00:00+00:00", "threads": 1,
    "versions": {"sparsify-vit": "0.1.0", "torch": "2.9.0"}, "further": [{"of": "0" * 64, "date": "2025-01-01"}],
    "finetuned": {"kept": "fine-tuned", "steps": 3, "judged_on": "held back"},
}  # fmt: skip
DEEP, DIGITS = "@deep@", "@digits@"  # stand for JSON that Python's writer refuses
JSON = {f'"{DEEP}"': "[" * 5000 + "]" * 5000, f'"{DIGITS}"': "9" * 5000}
STRINGS = (
    "",
    "x",
    "²",
    "\x1b]0;title\x07\x1b[2J",
    "a\nb",
    "hf-hub:../../x",
    "/etc/passwd",
    "<script>",
    "nan",
    "1",
    "a" * 9999,
)
NUMBERS = (0, -1, 1, 2, 3, 7, 64, 4096, 2**31, 2**63, 10**30, 0.5, -0.1, 1e308, float("nan"), float("inf"))
VALUES = (None, True, False, [], {}, [1], ["x"], [[]], {"x": 1}, [0.5] * 3, [3, 32, 32], [0] * 9999, DEEP, DIGITS)
ARGUMENTS = (
    "checkpoint_path pretrained features_only pretrained_cfg_overlay cache_dir scriptable exportable no_jit out_indices "
    "embed_dim depth num_heads num_classes in_chans img_size patch_size mlp_ratio qkv_bias qk_norm init_values class_token "
    "reg_tokens global_pool norm_layer act_layer block_fn attn_layer mlp_layer embed_layer fc_norm pre_norm weight_init "
    "drop_rate proj_drop_rate drop_path_rate patch_drop_rate dynamic_img_size num_kv_heads device dtype pruned cfg"
).split()
ARCHITECTURES = (
    "vit_gigantic_patch14_224",
    "vit_huge_patch14_224",
    "aimv2_huge_patch14_224",
    "swinv2_base_window8_256",
    "",
)


class File:
    """A file to be: its metadata as trees, and its tensors."""

    def __init__(self, trees: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.trees, self.tensors = trees, tensors
        self.version, self.texts, self.signed = str(header.FORMAT), dict[str, str](), True

    def meta(self) -> dict[str, str]:
        found = {"format": "pt", "sparsify.format": self.version}
        for key, tree in self.trees.items():
            text = json.dumps(tree, sort_keys=True)
            for placeholder, hostile in JSON.items():
                text = text.replace(placeholder, hostile)
            found[f"sparsify.{key}"] = self.texts.get(key, text)
        digest = checkpoint._digest(found, self.tensors) if self.signed else "0" * 64
        return found | {"sparsify.sha256": digest}

    def bytes(self) -> bytes:
        return save(self.tensors, self.meta())


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Drawn files, in `folder`."""
    images = _images(folder)
    seeds, files = [made(*host) for host in HOSTS], 0
    while True:
        draw = random.Random(f"{seed} {files}")
        file = copy.deepcopy(draw.choice(seeds))
        kind = draw.choice(list(CHANGES))
        name = CHANGES[kind](file, draw)
        for _ in range(draw.choice((0, 0, 0, 1))):
            name += f"; {_field(file, draw)}"
        file.signed = draw.random() < 0.95
        content = file.bytes()
        if kind == "bytes":
            content, name = _spoilt(content, draw)
        slow = draw.choices(SLOW, (50, 40, 9, 1))[0]
        seconds = EXPORT if slow == "export" else SECONDS
        yield Case(kind, name[:300], _run(folder, content, images, slow), seconds)
        files += 1


def made(architecture: str, args: dict[str, Any], config: SparsityConfig, *others: SparsityConfig) -> File:
    """A valid file of a small host with random weights; with `others` it has a schedule for each."""
    torch.manual_seed(0)
    args = {**args, "img_size": 28, "patch_size": 7} if architecture.startswith("eva02") else args
    source = Source(architecture, architecture, architecture, args)
    dense = building.with_true_config(building.build(architecture, args, None)).eval()
    model, several = graft.graft(dense, config, others=others), {}
    config = config.with_cells(17)
    if others:
        configs = zip(("0.7", "0.4"), (config, *others), strict=True)
        several = {b: {"config": c.model_dump(mode="json"), "report": {"macs_dense": 9}} for b, c in configs}
    tree = several and {
        "schedules": several,
        "sureness": {budget: {"margins": [0.1, 0.9], "distances": [0.2, 0.0]} for budget in several},
    }
    tree |= {"architecture": building.describe(model, source), "config": config.model_dump(mode="json")}
    tensors = {name: t.detach().clone().contiguous() for name, t in model.state_dict().items()}
    return File(
        {**tree, "provenance": copy.deepcopy(PROVENANCE), "report": {"macs_dense": 9, "macs_sparse": 7}}, tensors
    )


# ---- what is changed ----


def _value(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(draw.choice((STRINGS, NUMBERS, VALUES))))


def _paths(tree: Any, path: tuple = ()) -> list[tuple]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in [(*path, key), *_paths(value, (*path, key))]]


def _at(tree: Any, path: tuple) -> tuple[Any, Any]:
    for key in path[:-1]:
        tree = tree[key]
    return tree, path[-1]


def _field(file: File, draw: random.Random, under: tuple = ()) -> str:
    """A drawn field below `under` gets a drawn value, goes, or gets a neighbour."""
    tree: Any = file.trees
    for key in under:
        tree = tree[key]
    path = draw.choice(_paths(tree))
    parent, key = _at(tree, path)
    way, value = draw.choice(("set", "set", "set", "remove", "add")), _value(draw)
    if way == "remove":
        del parent[key]
    elif way == "add" and isinstance(parent, dict):
        parent["".join(draw.choices(string.printable, k=3))] = value
    else:
        parent[key] = value
    return f"{way} {'.'.join(map(str, (*under, *path)))} {str(value)[:60]!r}"


def _below(*under: str) -> Callable[[File, random.Random], str]:
    return lambda file, draw: _field(file, draw, under)


def _model_args(file: File, draw: random.Random) -> str:
    key, value = draw.choice(ARGUMENTS), _value(draw)
    file.trees["architecture"]["model_args"][key] = value
    return f"{key}={str(value)[:60]!r}"


def _architecture(file: File, draw: random.Random) -> str:
    name = draw.choice(ARCHITECTURES) if draw.random() < 0.3 else draw.choice(timm.list_models())
    file.trees["architecture"]["architecture"] = name
    if draw.random() < 0.3:
        file.trees["architecture"]["model_args"] = {}
    return name


def _text(file: File, draw: random.Random) -> str:
    key = draw.choice(list(file.trees))
    text = json.dumps(file.trees[key])
    at = draw.randrange(len(text))
    hostile = draw.choice(("", "[", "{", '"', "\\ud800", "NaN", "-", "9" * 5000, "[" * 5000, "\x00"))
    file.texts[key] = text[:at] + hostile + text[at + draw.choice((0, 1, 1000)) :]
    return f"text of {key} at {at}: {hostile[:9]!r}"


def _format(file: File, draw: random.Random) -> str:
    file.version = draw.choice(("", "0", "-1", "2", "²", "٣", "1.0", "01", "9" * 5000, "\x1b[31m", "x", "1\n"))
    return file.version[:9]


def _tensors(file: File, draw: random.Random) -> str:
    name = draw.choice(list(file.tensors))
    tensor = file.tensors.pop(name)
    way = draw.choice(("gone", "renamed", "flat", "half", "ints", "empty", "more"))
    if way in ("renamed", "more"):
        file.tensors[name + "\x1b[2J"] = tensor
    changed = {"flat": tensor.flatten()[None, None], "half": tensor.half(), "ints": tensor.long(), "empty": tensor[:0]}
    if way not in ("gone", "renamed"):
        file.tensors[name] = changed.get(way, tensor).clone()
    return f"{name} {way}"


def _spoilt(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes of a file flipped or cut, half of them in its header."""
    at = draw.randrange(draw.choice((len(content), int.from_bytes(content[:8], "little"), 8)))
    if draw.random() < 0.3:
        return content[:at], f"cut at {at}"
    return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :], f"bit at {at}"


CHANGES: dict[str, Callable[[File, random.Random], str]] = {
    "any field": _field,
    "config": _below("config"),
    "pretrained_cfg": _below("architecture", "pretrained_cfg"),
    "provenance": _below("provenance"),
    "report": _below("report"),
    "schedules": lambda file, draw: _field(file, draw, ("schedules",) if "schedules" in file.trees else ()),
    "sureness": lambda file, draw: _field(file, draw, ("sureness",) if "sureness" in file.trees else ()),
    "model_args": _model_args,
    "architecture": _architecture,
    "JSON text": _text,
    "format": _format,
    "tensors": _tensors,
    "bytes": lambda file, draw: "",
}


# ---- what is done with a file ----


def _images(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), dtype=np.uint8)
    for number, each in enumerate(pixels):
        path = folder / "images" / str(number) / "a.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(each).save(path)
    return folder / "images"


def _run(folder: Path, content: bytes, images: Path, slow: str) -> Callable[[], object]:
    file = folder / "model.safetensors"

    def run() -> None:
        file.write_bytes(content)
        model, found, _ = checkpoint.read(file)
        _budgets(model, found)
        options = {
            "eval": ("--data", images),
            "push": ("me/model", "--dry-run"),
            "profile": ("--no-measure", "--tree"),
            "report": ("--output", folder / "report.html"),
            "show": (images / "0" / "a.png", "--layer", "1", "--head", "1", "--output", folder / "show"),
            "export": ("--format", "onnx", "--force", "--output", folder / "model.onnx"),
        }
        for name in ("eval", "push", slow):
            try:
                command(name, file, *options[name])
            except SparsifyError as error:
                raise Fault(f"loads, then {name}: {error}") from None
        _saved(model, file, folder / "saved.safetensors")

    return run


def _budgets(model: nn.Module, found: header.Header) -> None:
    """Every budget is set and runs, and so does the adaptive form."""
    several = schedules.offered(model)
    if several is None:
        return
    images, before = torch.zeros(2, *cast(Any, model).pretrained_cfg["input_size"]), several.budget
    try:
        for budget in several.budgets:
            several(budget)
            model(images)
        several(before)
        if found.sureness:
            adaptive(model, found.rule(1.0))(images)
    except SparsifyError as error:
        raise Fault(f"loads, then set_budget: {error}") from None


def _saved(model: nn.Module, file: Path, path: Path) -> None:
    """Written again by `sparsify.save`, and read."""
    from sparsify.jobs.save import save

    try:
        save(model, path, file, force=True)
        checkpoint.load(path)
    except SparsifyError as error:
        raise Fault(f"loads, then save: {error}") from None
