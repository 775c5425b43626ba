"""The model card: what was converted from what, with which settings, at what cost, and how to load it.

Figures are theoretical, or measured and then shown with their conditions; what was not measured is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sparsify.measure.figures import Profile
from sparsify.models.checkpoint import Header
from sparsify.models.provenance import Licence
from sparsify.report import accuracy
from sparsify.report import profile as report
from sparsify.report.words import markdown_table, plain

CITATION = """\
@InProceedings{wei2023sparsifiner,
    author    = {Wei, Cong and Duke, Brendan and Jiang, Ruowei and Aarabi, Parham and Taylor, Graham W. and
                 Shkurti, Florian},
    title     = {Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers},
    booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
    year      = {2023},
    pages     = {22680-22689}
}"""


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    Attributes:
        repo: ORG/NAME.
        header: of the file.
        profile: theoretical MACs of the model and its dense twin.
        licence: of the weights.
        original: what was converted, in words; base: its name on the hub, '' where it has none.
        evaluation: results of `sparsify eval` with their conditions, of this very file; None: there are none.
        timing: figures of `sparsify profile` with their conditions, of a model of this shape; None: there are none.
    """

    repo: str
    header: Header
    profile: Profile
    licence: Licence
    original: str
    base: str
    evaluation: Mapping[str, Any] | None = None
    timing: Mapping[str, Any] | None = None


def card(facts: Facts) -> str:
    """The README.md of a repository: YAML for the hub, then Markdown for people."""
    sections = [
        _title(facts), _use(facts), _settings(facts), _cost(facts), _accuracy(facts), _speed(facts), _limits(facts),
        ["## Citation", "", "```bibtex", CITATION, "```"],
    ]  # fmt: skip
    body = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return f"---\n{yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)}---\n\n{body}\n"


def metadata(facts: Facts) -> dict[str, Any]:
    """The card's YAML; data sets are not named, for the file does not know them."""
    classes = _classes(facts.header)
    tree: dict[str, Any] = {"license": facts.licence.identifier}
    if facts.licence.identifier == "other":
        tree["license_name"] = facts.licence.name
    tree["library_name"] = "sparsify"
    tree["pipeline_tag"] = "image-classification" if classes else "image-feature-extraction"
    if facts.base:
        tree["base_model"] = facts.base
    tree["tags"] = ["sparsify", "timm", "vision-transformer", "sparse-attention", tree["pipeline_tag"]]
    return tree


def _title(facts: Facts) -> list[str]:
    h = facts.header
    config = h.config
    keeps = [config.keep_of(i) for i in range(_depth(facts))]
    shares = sorted({k for k in keeps if k is not None})
    words = "attends densely" if not shares else f"attends to {_range(shares)} of the keys, chosen for each image"
    some = f" in {len(keeps) - keeps.count(None)} of {len(keeps)} blocks" if shares and None in keeps else ""
    tokens = "; tokens leave on the way" if config.tokens is not None else ""
    lines = [
        f"# {facts.repo.partition('/')[2]}", "",
        f"{facts.original} with sparse attention: each patch {words}{some} by a small predictor{tokens}. "
        "The method follows Sparsifiner (CVPR 2023). Converted with "
        f"`sparsify` {h.provenance.get('versions', {}).get('sparsify-vit', '(version unknown)')}.",
    ]  # fmt: skip
    if facts.licence.note:
        lines += ["", f"> **Licence:** {facts.licence.note}"]
    return lines


def _use(facts: Facts) -> list[str]:
    return [
        "## How to load it", "",
        "```", "pip install sparsify-vit", "```", "",
        "```python",
        "import sparsify", "",
        f'model = sparsify.load("hf-hub:{facts.repo}")  # a timm model in eval mode; model(x) as usual',
        "```", "",
        "Or through timm, always in the sparse form:", "",
        "```python",
        "import timm, sparsify.registry", "",
        f'model = timm.create_model("hf-hub:{facts.repo}", pretrained=True)',
        "```", "",
        "`timm.data.resolve_model_data_config(model)` gives the preprocessing. Without `sparsify` timm does not know the "
        "architecture `sparsify_vit`, and says so.",
    ]  # fmt: skip


def _settings(facts: Facts) -> list[str]:
    h, c = facts.header, facts.header.config
    depth = _depth(facts)
    keeps = [c.keep_of(i) for i in range(depth)]
    sparse = [i for i, keep in enumerate(keeps) if keep is not None]
    args = h.architecture["model_args"]
    size = args.get("img_size") or h.architecture["pretrained_cfg"].get("input_size", [3, 224, 224])[1:]
    height, width = (size, size) if isinstance(size, int) else size
    rows = [
        ("converted from", facts.original),
        ("architecture (timm)", f"`{h.architecture['architecture']}`"),
        ("image size, classes", f"{height}x{width}, {_classes(h) or 'none (features)'}"),
        ("keep: share of keys of a query", _listed([keep if keep is not None else "dense" for keep in keeps])),
    ]
    if sparse:
        folded = c.predictor == "head-lowrank" and facts.profile.param_count == facts.profile.param_count_dense
        ranks = [round(sum(r) / len(r), 1) for r in (c.ranks_of(i, _heads(c.rank, i)) for i in sparse)]
        rows += [
            ("predictor", c.predictor + (", folded into qkv" if folded else "")),
            ("rank, mean over heads", _listed([f"{rank:g}" for rank in ranks])),
            ("tail: what stands for dropped keys", c.tail + _cells(c, sparse)),
            ("key sets", "one for each query" if c.granularity == "token" else f"one for each tile of {_grid(c.tile)}"),
        ]
    if c.tokens is not None:
        how = "merge" if c.tokens.way == "merge" else "leave"
        left = " ".join(str(before) for before, _ in facts.profile.tokens)
        rows.append(("tokens", f"they {how} ({c.tokens.way}); present in each block: {left}"))
    rows += [("calibration", _calibration(h)), ("trained", _training(h))]
    licence = facts.licence.name or "unknown"
    return [
        "## What was done", "", *markdown_table(("", ""), [(a, b) for a, b in rows], left=2), "", f"Licence: {licence}.",
    ]  # fmt: skip


def _cost(facts: Facts) -> list[str]:
    lines = ["## Cost", "", f"{report.THEORETICAL}; one multiply-accumulate counts once.", ""]
    lines += markdown_table(("", "dense", "sparse", "change"), report.headline(facts.profile))
    return [
        *lines,
        "",
        "Fewer MACs are no promise of speed: that depends on the machine (`sparsify profile` measures it).",
    ]


def _accuracy(facts: Facts) -> list[str]:
    r = facts.evaluation
    if r is None:
        return [
            "## Accuracy", "", f"Not measured for this card. `sparsify eval hf-hub:{facts.repo} --imagenet PATH` does it.",
        ]  # fmt: skip
    rows = [row for row in accuracy.pairs(r) if not row[0].startswith("throughput")]
    single = [row for row in accuracy.singles(r) if row[0] != "images"]
    lines = ["## Accuracy", "", "Measured, dense and sparse on the same images."]
    lines += ["", *markdown_table(("", "dense", "sparse", "change"), rows)] if rows else []
    lines += ["", *markdown_table(("sparse beside dense", ""), single)] if single else []
    return [*lines, "", f"Conditions: {accuracy.conditions(r)}."]


def _speed(facts: Facts) -> list[str]:
    t = facts.timing
    if t is None:
        return []
    c, rows = t["conditions"], []
    for label, name in (("dense", "dense"), ("sparse", "sparse"), ("backend=auto", "auto")):
        key = f"latency_ms_{name}"
        if t.get(key) is not None:
            rows.append((label, plain(t[key]), f"{plain(t[f'{key}_p10'])}-{plain(t[f'{key}_p90'])}"))
    threads = "1 thread" if c["threads"] == 1 else f"{c['threads']} threads"
    said = (
        f"{c['device_name']}, {threads}, {c['dtype']}, batch {c['batch_size']}, {_grid(c['img_size'])} px, {c['runs']} "
        f"interleaved runs, backend {t['backend']}, torch {c['torch']}, timm {c['timm']}"
    )
    return [
        "## Speed", "", "Measured on one machine; on another it may be the other way round.", "",
        *markdown_table(("", "ms/batch (median)", "p10-p90"), rows), "", f"Conditions: {said}.",
    ]  # fmt: skip


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
    found = h.provenance.get("calibration") or {}
    if not found.get("images"):
        return "none"
    kind = {"built-in": "built in", "user": "of the converter's own"}.get(str(found.get("set")), "")
    return f"{found['images']} images {kind}".strip()


def _training(h: Header) -> str:
    parts = []
    tuned = h.provenance.get("finetuned")
    if tuned:
        stages = ", ".join(str(s.get("name")) for s in (h.provenance.get("recipe") or {}).get("stages", []))
        done = f"{tuned.get('steps')} steps" + (f" ({stages})" if stages else "")
        parts.append(
            done if tuned.get("kept") == "fine-tuned" else f"{done}, and the calibrated weights kept: they were better"
        )
    if h.provenance.get("further"):
        parts.append("further by a training loop of its owner's")
    return "; then ".join(parts) or "not at all: closed form only"


def _classes(h: Header) -> int:
    return int(h.architecture["model_args"].get("num_classes") or 0)


def _depth(facts: Facts) -> int:
    return len(facts.profile.tokens)


def _heads(rank: Any, block: int) -> int:
    own = rank[block] if isinstance(rank, tuple) else rank
    return len(own) if isinstance(own, tuple) else 1


def _cells(c: Any, sparse: Sequence[int]) -> str:
    if c.tail not in ("cells", "clusters") or c.cells is None:
        return ""
    return f", {_listed([_grid(c.cells_of(i)) for i in sparse])} cells"


def _grid(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def _range(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:g}" for share in (shares[0], shares[-1]))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _listed(values: Sequence[Any]) -> str:
    """One value where all blocks have the same, else all of them."""
    words = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    return words[0] if len(set(words)) == 1 else " ".join(words)
