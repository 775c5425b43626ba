"""The names of the models that can be converted."""

from __future__ import annotations

import fnmatch

import timm

from sparsify.errors import UnsupportedModel, field
from sparsify.models.building import shallow
from sparsify.models.names import ALIASES, DIGITS
from sparsify.nn import hosts


def listing(pattern: str = "") -> list[tuple[str, str]]:
    """Models that can be converted, as (name, note): `digits`, aliases, timm architectures.

    `pattern` is a part of the name, or a shell pattern (`vit_*dinov2*`). Each architecture is built on the meta device,
    one block deep (its blocks are alike), and checked: 292 architectures in 8 s. A note may hold marked fields.
    """
    pattern = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    tags: dict[str, list[str]] = {}
    for name in timm.list_pretrained():
        architecture, _, tag = name.partition(".")
        tags.setdefault(architecture, []).append(tag)
    rows = [(DIGITS, "built in: 28 px, 197 tokens, 10 classes; weights and data come with the package")]
    rows += [(alias, f"-> {target}") for alias, target in ALIASES.items()]
    rows = [row for row in rows if fnmatch.fnmatch(row[0], pattern)]
    for architecture in architectures():
        if fnmatch.fnmatch(architecture, pattern):
            try:
                hosts.supported_attentions(shallow(architecture), architecture)
            except UnsupportedModel:
                continue
            known = tags.get(architecture)
            none = f"no weights: give {field('weights')} FILE"
            rows.append((architecture, f"weights: {', '.join(known)}" if known else none))
    return rows


def architectures() -> list[str]:
    """timm's names in the modules of `hosts.MODULES`; a few of them cannot be converted."""
    return sorted({name for module in hosts.MODULES for name in timm.list_models(module=module)})
