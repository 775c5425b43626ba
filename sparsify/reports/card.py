"""The model card: what was converted from what, with which settings, at what cost, and how to load it.

Figures are theoretical, or measured and shown with their conditions; what was not measured is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sparsify.measure.figures import Profile
from sparsify.models.checkpoint import Header
from sparsify.models.licence import Licence
from sparsify.models.provenance import Origin
from sparsify.reports import accuracy, header, profile, words
from sparsify.reports.words import HEADINGS


@dataclass(frozen=True)
class Facts:
    """What a card tells."""

    repo: str  # ORG/NAME
    header: Header
    profile: Profile  # theoretical MACs of the model and its dense twin
    licence: Licence  # of the weights
    original: Origin  # what was converted
    evaluation: Mapping[str, Any] | None = None  # results of `sparsify eval` with their conditions, of this very file
    timing: Profile | None = None  # what `sparsify profile` measured of a model of this shape

    @property
    def classes(self) -> int:
        """0 without a classifier."""
        return int(self.header.architecture["model_args"].get("num_classes") or 0)

    @property
    def keeps(self) -> list[float | None]:
        """Of each block; None: dense."""
        return [self.header.config.keep_of(i) for i in range(len(self.profile.tokens))]


def card(facts: Facts) -> str:
    """The README.md of a repository: YAML for the hub, then Markdown for people."""
    about, result, p = facts.header, facts.evaluation or {}, facts.timing
    m, timed_on = None if p is None else p.measured, ""
    if p is not None and m is not None:
        c, runs = p.conditions, f"{p.conditions['runs']} interleaved runs"
        timed_on = words.timed_on(c["device_name"], c, runs, p.backend, " px")
    times = [] if m is None else [("dense", m.dense), ("sparse", m.sparse), ("backend=auto", m.auto)]
    body = words.rendered(
        "card.md.jinja",
        facts=facts,
        name=facts.repo.partition("/")[2],
        attends=_attends(facts),
        config=about.config,
        version=about.provenance.get("versions", {}).get("sparsify-vit", "(version unknown)"),
        **_settings(facts),
        theoretical=profile.THEORETICAL,
        headings=HEADINGS,
        headline=profile.headline(facts.profile),
        budgets=header.budgets(about),
        budget_columns=header.BUDGET_COLUMNS,
        pairs=[row for row in accuracy.pairs(result) if not row[0].startswith("throughput")],
        singles=[row for row in accuracy.singles(result) if row[0] != "images"],
        evaluated_on=accuracy.conditions(result) if result else "",
        times=[(label, words.plain(time.median), words.spread(time)) for label, time in times if time is not None],
        timed_on=timed_on,
        changed=about.backbone_changed,
        provenance=about.provenance,
        calibration=about.provenance.get("calibration") or {},
    )
    return f"---\n{yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)}---\n\n{body}"


def metadata(facts: Facts) -> dict[str, Any]:
    """The card's YAML, without data sets: the file does not name them."""
    tree: dict[str, Any] = {"license": facts.licence.identifier}
    if facts.licence.identifier == "other":
        tree["license_name"] = facts.licence.name
    tree["library_name"] = "sparsify"
    tree["pipeline_tag"] = "image-classification" if facts.classes else "image-feature-extraction"
    if facts.original.base:
        tree["base_model"] = facts.original.base
    tree["tags"] = ["sparsify", "timm", "vision-transformer", "sparse-attention", tree["pipeline_tag"]]
    return tree


def _attends(facts: Facts) -> str:
    keeps = facts.keeps
    shares = sorted({k for k in keeps if k is not None})
    if not shares:
        return "attends densely"
    low, high = (f"{100 * share:.3g}" for share in (shares[0], shares[-1]))
    keys = f"{low} %" if low == high else f"{low} to {high} %"
    some = f" in {len(keeps) - keeps.count(None)} of {len(keeps)} blocks" if None in keeps else ""
    return f"attends to {keys} of the keys, chosen for each image{some}"


def _settings(facts: Facts) -> dict[str, Any]:
    """The settings of the blocks in words, by the name that the template has for them."""
    h, c, keeps = facts.header, facts.header.config, facts.keeps
    sparse = [i for i, keep in enumerate(keeps) if keep is not None]
    ranks = [round(sum(r) / len(r), 1) for r in (c.ranks_of(i, _heads(c.rank, i)) for i in sparse)]
    size = h.architecture["model_args"].get("img_size")
    sides = size or h.architecture["pretrained_cfg"].get("input_size", [3, 224, 224])[1:]
    return {
        "size": words.rectangle((sides, sides) if isinstance(sides, int) else sides),
        "keeps": _listed(["dense" if keep is None else float(f"{keep:.3g}") for keep in keeps]),
        "sparse": bool(sparse),
        "folded": c.predictor == "head-lowrank" and facts.profile.param_count == facts.profile.param_count_dense,
        "ranks": _listed([f"{rank:g}" for rank in ranks]) if sparse else "",
        "cells": _cells(c, sparse),
        "tile": words.rectangle(c.tile),
        "present": " ".join(str(before) for before, _ in facts.profile.tokens),
    }


def _heads(rank: Any, block: int) -> int:
    own = rank[block] if isinstance(rank, tuple) else rank
    return len(own) if isinstance(own, tuple) else 1


def _cells(c: Any, sparse: Sequence[int]) -> str:
    if c.tail not in ("cells", "clusters") or c.cells is None:
        return ""
    return f", {_listed([words.cells(c.cells_of(i)) for i in sparse])} cells"


def _listed(values: Sequence[Any]) -> str:
    """One value if all blocks have the same, else all of them."""
    texts = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)
