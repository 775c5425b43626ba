"""What the header of a file says, in words: where the model comes from, how it was made, its settings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sparsify.config import SparsityConfig, listed
from sparsify.models.checkpoint import Header
from sparsify.models.licence import licence_of
from sparsify.reports import words

Fact = tuple[str, str]  # what, in words


def origin(header: Header, file: Path) -> list[Fact]:
    """The file; what was converted, how, when, and with which libraries."""
    about, built = header.provenance, header.architecture
    pretrained = words.mapping(built.get("pretrained_cfg"))
    recipe, calibration = words.mapping(about.get("recipe")), words.mapping(about.get("calibration"))
    tag = f".{pretrained['tag']}" if pretrained.get("tag") else ""
    size = words.mapping(built.get("model_args")).get("img_size") or pretrained.get("input_size")
    sides: list[Any] = size[-2:] if isinstance(size, list) else [size, size]
    kind = {"user": "user images", "built-in": "built-in pictures"}.get(str(calibration.get("set")), "images")
    versions, weights = words.mapping(about.get("versions")), "the original's, not trained further"
    if header.backbone_changed:
        known = about.get("backbone_changed") is True
        weights = "fine-tuned after the conversion" if known else "fine-tuned, or not: the file does not say"
    facts = [
        ("file", f"{file.name}, {words.memory(file.stat().st_size)}"),
        ("converted from", str(about.get("source") or "")),
        ("form of the original", f"{form} of Hugging Face transformers" if (form := about.get("transformers")) else ""),
        ("checkpoint", str(about.get("weights") or "") + (", its averaged weights (EMA)" if about.get("ema") else "")),
        ("architecture", f"{built.get('architecture', '')}{tag}"),
        ("image", f"{words.rectangle(sides)} pixels" if all(isinstance(side, int) for side in sides) else ""),
        ("licence of the weights", licence_of(header).name or "unknown"),
        ("recipe", str(recipe.get("description") or "")),
        ("budget", _budget(header)),
        ("calibrated on", f"{calibration['images']} {kind}" if calibration.get("images") else ""),
        ("weights", weights),
        ("date", str(about.get("date") or "")[:10]),
        ("made with", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(what, text) for what, text in facts if text]


def settings(config: SparsityConfig) -> list[Fact]:
    """The sparse attention, and which tokens remain."""
    facts = [("keep, share of keys", _keep(config))]
    if not set(listed(config.keep)) <= {"dense"}:
        tile = f" of {words.rectangle(config.tile)}" if config.granularity == "tile" else ""
        facts += [
            ("predictor", f"{config.predictor}, rank {_rank(config.rank)}"),
            ("tail", _tail(config)),
            ("granularity", config.granularity + tile),
        ]
    if config.tokens is None:
        return [*facts, ("tokens", "all go on")]
    t = config.tokens
    if isinstance(t.keep, tuple):
        return [*facts, ("tokens", f"{t.way}; rates of the layers {_each(t.keep)}")]
    layers = ", ".join(map(str, sorted(t.stages or ())))
    return [*facts, ("tokens", f"{t.way}; {t.keep:g} of the patch tokens kept after layers {layers}")]


def title(header: Header) -> str:
    """What was converted, in a few words."""
    return str(header.provenance.get("source") or header.architecture.get("architecture") or "model")


def _tail(config: SparsityConfig) -> str:
    if config.tail in ("none", "mean") or config.cells is None:
        return config.tail
    grids = [config.cells_of(i) for i in range(1 if isinstance(config.cells[0], int) else len(config.cells))]
    if all(len(each) == 1 for each in grids):
        return f"{config.tail}, {_runs([words.rectangle(each[0]) for each in grids])} cells"
    counts = [rows * columns for each in grids for rows, columns in each]
    return f"{config.tail}, {sum(counts) / len(counts):.3g} cells on average, {min(counts)} to {max(counts)} by head"


def _rank(rank: Any) -> str:
    if isinstance(rank, int):
        return str(rank)
    flat = [each for block in rank for each in (block if isinstance(block, tuple | list) else [block])]
    return f"{sum(flat) / len(flat):.3g} on average, {min(flat)} to {max(flat)}"


def by_head(config: SparsityConfig) -> str:
    """What heads have that differ, in one line: 'keep 0.15 (0.015 to 0.35), rank 11 (4 to 24), cells 8 (1 to 25)'; or ''."""
    blocks = [i for i in range(len(listed(config.keep))) if config.keeps_of(i) is not None]
    if isinstance(config.rank, int) or not isinstance(config.rank[0], tuple):
        return ""
    keeps = [keep for i in blocks for keep in config.keeps_of(i) or ()]
    ranks = [rank for i in blocks for rank in config.ranks_of(i, 1)]
    cells = [] if config.cells is None else [rows * columns for i in blocks for rows, columns in config.cells_of(i)]
    parts = [
        f"{name} {sum(every) / len(every):.3g} ({min(every):.3g} to {max(every):.3g})"
        for name, every in (("keep", keeps), ("rank", ranks), ("cells", cells))
        if len(set(every)) > 1
    ]
    return ", ".join(parts)


def budgets(header: Header) -> list[tuple[str, str, str]]:
    """The budgets of a file with several: each, its GMACs, and as a share of the dense model's MACs."""
    rows = []
    for budget, each in header.schedules.items() if len(header.schedules) > 1 else ():
        sparse, dense = each.report.get("macs_sparse"), each.report.get("macs_dense")
        macs = f"{sparse / 1e9:.3f}" if sparse else ""
        now = " (in use)" if budget == header.budget else ""
        rows.append((f"{budget:g}{now}", macs, f"{sparse / dense:.3f}" if sparse and dense else ""))
    return rows


BUDGET_COLUMNS = ("budget", "GMACs", "of dense")


def budgets_markdown(header: Header) -> str:
    """`budgets` as a table, with its heading."""
    lines = ["| " + " | ".join(row) + " |" for row in (BUDGET_COLUMNS, ("---:",) * 3, *budgets(header))]
    text = "One file, one backbone, a schedule for each budget (`model.set_budget(...)`, `--budget`)."
    return "\n".join(["# Budgets", "", f"{text} What follows is of the one in use.", "", *lines, ""])


def _budget(header: Header) -> str:
    """'0.55; the file has 0.7, 0.55, 0.4 too'."""
    if header.budget is None:
        return ""
    several = [budget for budget in header.schedules if budget != header.budget]
    others = f"; the file also has {', '.join(f'{each:g}' for each in several)}" if several else ""
    return f"{header.budget:g} of the dense model's cost{others}"


def _keep(config: SparsityConfig) -> str:
    """'0.1', by layer where it differs; of layers whose heads differ the mean, and the range over all heads."""
    blocks = range(len(listed(config.keep)))
    keeps = [config.keeps_of(i) for i in blocks]
    by_layer = _each(tuple("dense" if (keep := config.keep_of(i)) is None else keep for i in blocks))
    if all(keep is None or len(keep) == 1 for keep in keeps):
        return by_layer
    every = [keep for block in keeps for keep in block or ()]
    return f"{sum(every) / len(every):.3g} on average, {min(every):.2g} to {max(every):.2g} by head; layers {by_layer}"


def _each(value: Any) -> str:
    """0.1 -> '0.1'; (0.1, 0.1, 'dense') -> '0.1 (2 layers), dense'."""
    return _runs([each if isinstance(each, str) else f"{each:.3g}" for each in listed(value)])


def _runs(values: Sequence[str]) -> str:
    if len(set(values)) == 1:
        return values[0]
    runs = [(value, len(list(group))) for value, group in groupby(values)]
    return ", ".join(value if count == 1 else f"{value} ({count} layers)" for value, count in runs)
