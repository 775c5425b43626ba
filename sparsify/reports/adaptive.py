"""Costs of adaptive inference as rows of a table."""

from __future__ import annotations

from sparsify.measure.adaptive import DENSE, AdaptiveProfile
from sparsify.reports import words

COLUMNS = ("", "dense", "mean", "of dense", "worst", "of dense")


def rows(p: AdaptiveProfile) -> list[tuple[str, ...]]:
    """MACs of an image, and ms of a batch where they were measured: dense, in the mean, and where all run twice."""
    found: list[tuple[str, ...]] = []
    batch = p.conditions.get("batch_size")
    for label, costs, show in (("MACs", p.macs, words.human), (f"ms, batch {batch}", p.medians, words.plain)):
        if costs:
            dense, mean, worst = costs[DENSE], p.mean(costs), p.worst(costs)
            cells = (show(dense), show(mean), f"{mean / dense:.2f}", show(worst), f"{worst / dense:.2f}")
            found.append((label, *cells))
    return found


def notes(p: AdaptiveProfile) -> list[str]:
    """What the rows stand for, and how they were measured."""
    lines = [p.rule.words(), "MACs: theoretical; mean: with the share of the calibration images that ran twice"]
    if p.times:
        c = p.conditions
        lines.append(words.timed_on(words.device(c), c, f"medians of {c['runs']} interleaved runs", "auto"))
    return lines


def markdown(p: AdaptiveProfile) -> str:
    """Rows and notes as GitHub Markdown."""
    table = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *rows(p)]
    return "\n".join(["# Adaptive", "", *("| " + " | ".join(row) + " |" for row in table), "", *notes(p), ""])
