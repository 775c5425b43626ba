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
from sparsify.models.provenance import Licence
from sparsify.report import accuracy, profile, words
from sparsify.report.words import HEADINGS, markdown_table

CITATION = """\
@InProceedings{wei2023sparsifiner,
    author    = {Wei, Cong and Duke, Brendan and Jiang, Ruowei and Aarabi, Parham and Taylor, Graham W. and
                 Shkurti, Florian},
    title     = {Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers},
    booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
    year      = {2023},
    pages     = {22680-22689}
}"""

USE = """\
## How to load it

```
pip install sparsify-vit
```

```python
import sparsify

model = sparsify.load("hf-hub:{repo}")  # a timm model in eval mode; model(x) as usual
```

Or through timm, always in the sparse form:

```python
import timm, sparsify.registry

model = timm.create_model("hf-hub:{repo}", pretrained=True)
```

`timm.data.resolve_model_data_config(model)` gives the preprocessing. Without `sparsify` timm does not know the \
architecture `sparsify_vit`, and says so."""


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    Attributes:
        repo: ORG/NAME.
        header: of the file.
        profile: theoretical MACs of the model and its dense twin.
        licence: of the weights.
        original: what was converted, in words; base: its name on the hub, '' if it has none.
        evaluation: results of `sparsify eval` with their conditions, of this very file; None: there are none.
        timing: what `sparsify profile` measured of a model of this shape; None: nothing.
    """

    repo: str
    header: Header
    profile: Profile
    licence: Licence
    original: str
    base: str
    evaluation: Mapping[str, Any] | None = None
    timing: Profile | None = None

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
    sections = [_title(facts), [USE.format(repo=facts.repo)], _settings(facts), _cost(facts), _accuracy(facts)]
    sections += [_speed(facts), _limits(facts), ["## Citation", "", "```bibtex", CITATION, "```"]]
    body = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return f"---\n{yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)}---\n\n{body}\n"


def metadata(facts: Facts) -> dict[str, Any]:
    """The card's YAML, without data sets: the file does not name them."""
    tree: dict[str, Any] = {"license": facts.licence.identifier}
    if facts.licence.identifier == "other":
        tree["license_name"] = facts.licence.name
    tree["library_name"] = "sparsify"
    tree["pipeline_tag"] = "image-classification" if facts.classes else "image-feature-extraction"
    if facts.base:
        tree["base_model"] = facts.base
    tree["tags"] = ["sparsify", "timm", "vision-transformer", "sparse-attention", tree["pipeline_tag"]]
    return tree


def _title(facts: Facts) -> list[str]:
    keeps, tokens = facts.keeps, facts.header.config.tokens
    shares = sorted({k for k in keeps if k is not None})
    attends = "attends densely" if not shares else f"attends to {_range(shares)} of the keys, chosen for each image"
    some = f" in {len(keeps) - keeps.count(None)} of {len(keeps)} blocks" if shares and None in keeps else ""
    version = facts.header.provenance.get("versions", {}).get("sparsify-vit", "(version unknown)")
    lines = [
        f"# {facts.repo.partition('/')[2]}",
        "",
        f"{facts.original} with sparse attention: each patch {attends}{some} by a small predictor"
        f"{'; tokens leave on the way' if tokens is not None else ''}. "
        f"The method follows Sparsifiner (CVPR 2023). Converted with `sparsify` {version}.",
    ]
    return lines + (["", f"> **Licence:** {facts.licence.note}"] if facts.licence.note else [])


def _settings(facts: Facts) -> list[str]:
    h, c, keeps = facts.header, facts.header.config, facts.keeps
    sparse = [i for i, keep in enumerate(keeps) if keep is not None]
    args = h.architecture["model_args"]
    size = args.get("img_size") or h.architecture["pretrained_cfg"].get("input_size", [3, 224, 224])[1:]
    sides = (size, size) if isinstance(size, int) else size
    rows = [
        ("converted from", facts.original),
        ("architecture (timm)", f"`{h.architecture['architecture']}`"),
        ("image size, classes", f"{words.rectangle(sides)}, {facts.classes or 'none (features)'}"),
        ("keep: share of keys of a query", _listed([keep if keep is not None else "dense" for keep in keeps])),
    ]
    if sparse:
        folded = c.predictor == "head-lowrank" and facts.profile.param_count == facts.profile.param_count_dense
        ranks = [round(sum(r) / len(r), 1) for r in (c.ranks_of(i, _heads(c.rank, i)) for i in sparse)]
        tiles = f"one for each tile of {words.rectangle(c.tile)}"
        rows += [
            ("predictor", c.predictor + (", folded into qkv" if folded else "")),
            ("rank, mean over heads", _listed([f"{rank:g}" for rank in ranks])),
            ("tail: what stands for dropped keys", c.tail + _cells(c, sparse)),
            ("key sets", "one for each query" if c.granularity == "token" else tiles),
        ]
    if c.tokens is not None:
        how = "merge" if c.tokens.way == "merge" else "leave"
        present = " ".join(str(before) for before, _ in facts.profile.tokens)
        rows.append(("tokens", f"they {how} ({c.tokens.way}); present in each block: {present}"))
    rows += [("calibration", _calibration(h)), ("trained", _training(h))]
    table = markdown_table(("", ""), rows, left=2)
    return ["## What was done", "", *table, "", f"Licence: {facts.licence.name or 'unknown'}."]


def _cost(facts: Facts) -> list[str]:
    return [
        "## Cost",
        "",
        f"{profile.THEORETICAL}; one multiply-accumulate counts once.",
        "",
        *markdown_table(HEADINGS, profile.headline(facts.profile)),
        "",
        "Fewer MACs are no promise of speed: that depends on the machine (`sparsify profile` measures it).",
    ]


def _accuracy(facts: Facts) -> list[str]:
    r, lines = facts.evaluation, ["## Accuracy", ""]
    if r is None:
        return [*lines, f"Not measured for this card. `sparsify eval hf-hub:{facts.repo} --imagenet PATH` does it."]
    pairs = [row for row in accuracy.pairs(r) if not row[0].startswith("throughput")]
    singles = [row for row in accuracy.singles(r) if row[0] != "images"]
    lines.append("Measured, dense and sparse on the same images.")
    lines += ["", *markdown_table(HEADINGS, pairs)] if pairs else []
    lines += ["", *markdown_table(("sparse beside dense", ""), singles)] if singles else []
    return [*lines, "", f"Conditions: {accuracy.conditions(r)}."]


def _speed(facts: Facts) -> list[str]:
    p = facts.timing
    if p is None or p.measured is None:
        return []
    c, m = p.conditions, p.measured
    rows = [
        (label, words.plain(timing.median), words.spread(timing))
        for label, timing in (("dense", m.dense), ("sparse", m.sparse), ("backend=auto", m.auto))
        if timing is not None
    ]
    return [
        "## Speed",
        "",
        "Measured on one machine; on another it may be the other way round.",
        "",
        *markdown_table(("", "ms/batch (median)", "p10-p90"), rows),
        "",
        f"Conditions: {words.setup(c['device_name'], c)}, {words.rectangle(c['img_size'])} px, {c['runs']} interleaved "
        f"runs, backend {p.backend}, torch {c['torch']}, timm {c['timm']}.",
    ]


def _limits(facts: Facts) -> list[str]:
    lines = [
        "Whatever the original cannot do, this model cannot either, and its biases are the same.",
        "Figures of other data than those above are not known.",
        "The fast kernels are for CPUs (Linux, x86-64, AVX2 and a C++ compiler); elsewhere a slow reference computes.",
    ]
    if facts.header.provenance.get("calibration", {}).get("set") == "built-in" and not facts.header.backbone_changed:
        lines.insert(1, "It was calibrated on a small built-in set: for images of another kind, calibrate on your own.")
    if facts.header.backbone_changed:
        lines.insert(1, "Its weights are not the original's any more: it cannot be turned back into the dense model.")
    return ["## Limits", "", *(f"- {line}" for line in lines)]


def _calibration(h: Header) -> str:
    calibration = h.provenance.get("calibration") or {}
    if not calibration.get("images"):
        return "none"
    kind = {"built-in": "built in", "user": "of the converter's own"}.get(str(calibration.get("set")), "")
    return f"{calibration['images']} images {kind}".strip()


def _training(h: Header) -> str:
    parts = []
    tuned = h.provenance.get("finetuned")
    if tuned:
        stages = ", ".join(str(s.get("name")) for s in (h.provenance.get("recipe") or {}).get("stages", []))
        worse = "" if tuned.get("kept") == "fine-tuned" else ", and the calibrated weights kept: they were better"
        parts.append(f"{tuned.get('steps')} steps" + (f" ({stages})" if stages else "") + worse)
    if h.provenance.get("further"):
        parts.append("further by a training loop of its owner's")
    return "; then ".join(parts) or "not at all: closed form only"


def _heads(rank: Any, block: int) -> int:
    own = rank[block] if isinstance(rank, tuple) else rank
    return len(own) if isinstance(own, tuple) else 1


def _cells(c: Any, sparse: Sequence[int]) -> str:
    if c.tail not in ("cells", "clusters") or c.cells is None:
        return ""
    return f", {_listed([words.rectangle(c.cells_of(i)) for i in sparse])} cells"


def _range(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:g}" for share in (shares[0], shares[-1]))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _listed(values: Sequence[Any]) -> str:
    """One value if all blocks have the same, else all of them."""
    texts = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)
