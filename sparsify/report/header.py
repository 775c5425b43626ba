"""What a file says of itself, in words: where it comes from, how it was made, its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sparsify.config import SparsityConfig
from sparsify.models.checkpoint import Header
from sparsify.report.words import memory

Fact = tuple[str, str]  # what, in words


def origin(header: Header, file: Path) -> list[Fact]:
    """The file, what was converted, how, when, and with which libraries."""
    about, built = header.provenance, header.architecture
    pretrained = _mapping(built.get("pretrained_cfg"))
    recipe, calibration = _mapping(about.get("recipe")), _mapping(about.get("calibration"))
    tag = f".{pretrained['tag']}" if pretrained.get("tag") else ""
    size = _mapping(built.get("model_args")).get("img_size") or pretrained.get("input_size")
    sides: list[Any] = size[-2:] if isinstance(size, list) else [size, size]
    kind = {"user": "images of the user's", "built-in": "built-in pictures"}.get(str(calibration.get("set")), "images")
    versions = _mapping(about.get("versions"))
    facts = [
        ("file", f"{file.name}, {memory(file.stat().st_size)}"),
        ("converted from", str(about.get("source") or "")),
        ("checkpoint", str(about.get("weights") or "")),
        ("architecture", f"{built.get('architecture', '')}{tag}"),
        ("image", f"{_rectangle(sides)} pixels" if all(isinstance(side, int) for side in sides) else ""),
        ("licence of the weights", str(pretrained.get("license") or "unknown")),
        ("recipe", str(recipe.get("description") or "")),
        ("calibrated on", f"{calibration['images']} {kind}" if calibration.get("images") else ""),
        ("weights", _weights(header)),
        ("date", str(about.get("date") or "")[:10]),
        ("made with", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(what, words) for what, words in facts if words]


def settings(config: SparsityConfig) -> list[Fact]:
    """The sparse attention, and which tokens go on."""
    facts = [("keep, share of keys", _each(config.keep))]
    if not set(_listed(config.keep)) <= {"dense"}:
        facts += [
            ("predictor", f"{config.predictor}, rank {_rank(config.rank)}"),
            ("tail", _tail(config)),
            (
                "granularity",
                config.granularity + (f" of {_rectangle(config.tile)}" if config.granularity == "tile" else ""),
            ),
        ]
    if config.tokens is None:
        return [*facts, ("tokens", "all go on")]
    t = config.tokens
    if isinstance(t.keep, tuple):
        return [*facts, ("tokens", f"{t.way}; rates of the layers {_each(t.keep)}")]
    layers = ", ".join(map(str, sorted(t.stages)))
    return [*facts, ("tokens", f"{t.way}; {t.keep:g} of the patch tokens go on behind layers {layers}")]


def title(header: Header) -> str:
    """What was converted, in a few words."""
    return str(header.provenance.get("source") or header.architecture.get("architecture") or "model")


def _weights(header: Header) -> str:
    if header.provenance.get("backbone_changed") is True:
        return "fine-tuned after the conversion"
    return (
        "fine-tuned, or not: the file does not say"
        if header.backbone_changed
        else "the original's, not trained further"
    )


def _tail(config: SparsityConfig) -> str:
    if config.tail in ("none", "mean") or config.cells is None:
        return config.tail
    grids = [config.cells] if isinstance(config.cells[0], int) else list(config.cells)
    words = [_rectangle(grid) for grid in grids]  # type: ignore[arg-type]
    return f"{config.tail}, {_runs(words)} cells"


def _rank(rank: Any) -> str:
    if isinstance(rank, int):
        return str(rank)
    flat = [each for block in rank for each in (block if isinstance(block, tuple | list) else [block])]
    return f"{sum(flat) / len(flat):.3g} on average, {min(flat)} to {max(flat)}"


def _each(value: Any) -> str:
    """0.1 -> '0.1'; (0.1, 0.1, 'dense') -> '0.1 (2 layers), dense'."""
    return _runs([each if isinstance(each, str) else f"{each:.3g}" for each in _listed(value)])


def _runs(words: Sequence[str]) -> str:
    if len(set(words)) == 1:
        return words[0]
    runs = [(word, len(list(group))) for word, group in groupby(words)]
    return ", ".join(word if count == 1 else f"{word} ({count} layers)" for word, count in runs)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _rectangle(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
