"""The plot of a fine-tuning run: loss, learning rate and validation over the optimiser steps of all stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsify.files.outputs import write_all
from sparsify.reports import drawing
from sparsify.reports.drawing import BLUE, GREEN, ORANGE, PURPLE

SHADES = ("0.92", "0.84")  # of odd and even stages
POINTS = 2000  # of a line: of more, only the minimum and maximum of each bin are drawn
WIDE = 20.0  # ratio of maximum to minimum from which an axis is logarithmic

Row = Mapping[str, Any]


class Curve(NamedTuple):
    """A column of validation.csv that is drawn as a line."""

    field: str
    name: str
    colour: str


PERCENT = (Curve("top1", "top-1", GREEN), Curve("agreement", "agreement", BLUE))
KL = (Curve("kl", "KL", PURPLE),)


class Span(NamedTuple):
    """The steps of a stage, `begin` + 1 to `end`."""

    number: int  # from 1
    name: str
    begin: int
    end: int


def draw(steps: Sequence[Row], scores: Sequence[Row], target: Path, stages: Sequence[str] = ()) -> None:
    """Draw steps and validations (`sparsify.fit.finetune.log`) as a PNG, 1800 pixels wide; nothing without rows.

    stages: their names; without, 'stage 1' and so on. Raises `BadFile` if `target` cannot be written.
    """
    if not steps and not scores:
        return
    spans = _spans([*steps, *scores], stages)
    percent, kl = _present(scores, PERCENT), _present(scores, KL)
    heights = [(0.22, True), (2.6, bool(steps)), (0.8, bool(steps)), (2.0, bool(percent)), (1.2, bool(kl))]
    shown = [height for height, there in heights if there]
    figure = drawing.figure(9, 0.9 + 1.05 * sum(shown), 200, layout="constrained")
    panels = list(figure.subplots(len(shown), 1, sharex=True, height_ratios=shown, squeeze=False)[:, 0])
    short = _names(panels[0], spans)
    rest = iter(panels[1:])
    if steps:
        _loss(next(rest), steps)
        _rate(next(rest), steps)
    if percent:
        _scores(next(rest), scores, percent, "% of validation\nimages")
    if kl:
        _scores(next(rest), scores, kl, "KL, nats")
    for axes in panels[1:]:
        for i, span in enumerate(spans):
            axes.axvspan(span.begin, span.end, color=SHADES[i % 2], alpha=0.45, linewidth=0, zorder=0)
        axes.grid(alpha=0.35, linewidth=0.6)
        drawing.tidy(axes)
        axes.margins(y=0.12)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.02), fontsize=8.5, frameon=False)
    last = panels[-1]
    last.set_xlabel(f"optimiser step{f' (stages: {short})' if short else ''}", fontsize=10, parse_math=False)
    last.set_xlim(-0.006 * spans[-1].end, 1.015 * spans[-1].end)  # room for the marks of the last step
    last.xaxis.get_major_locator().set_params(integer=True)
    last.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    figure.align_ylabels(panels)
    write_all({target: drawing.png(figure)})


def _spans(rows: Sequence[Row], names: Sequence[str]) -> list[Span]:
    """Each stage from its first to its last step; one that has only a validation before its first step is left out."""
    ends: dict[int, int] = {}
    for row in rows:
        ends[row["stage"]] = max(ends.get(row["stage"], 0), row["step"])
    spans: list[Span] = []
    for number, end in sorted(ends.items()):
        begin = spans[-1].end if spans else 0
        if end > begin:
            named = f"{number + 1} {names[number]}" if number < len(names) else f"stage {number + 1}"
            spans.append(Span(number + 1, named, begin, end))
    return spans or [Span(0, "start", 0, 1)]


def _present(rows: Sequence[Row], scores: Sequence[Curve]) -> list[Curve]:
    return [s for s in scores if any(row[s.field] is not None for row in rows)]


def _names(axes: Any, spans: Sequence[Span]) -> str:
    """Draw a strip with the names of the stages; where it is too narrow a number, whose name is in the returned text."""
    short = []
    for i, span in enumerate(spans):
        axes.axvspan(span.begin, span.end, color=SHADES[i % 2], linewidth=0)
        room = (span.end - span.begin) / spans[-1].end * 84  # characters
        label = span.name
        if len(label) > room:
            short.append(label)
            label = str(span.number) if len(str(span.number)) <= room else ""
        axes.text((span.begin + span.end) / 2, 0.46, label, ha="center", va="center", fontsize=9, parse_math=False)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.tick_params(bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    return ", ".join(short)


def _loss(axes: Any, rows: Sequence[Row]) -> None:
    """The loss of each step, thin, and its running mean within a stage."""
    means: list[float] = []
    for _, group in groupby(rows, lambda row: row["stage"]):
        some = [(r["step"], r["loss"]) for r in group if r["loss"] is not None and math.isfinite(r["loss"])]
        if not some:
            continue
        x, y = np.array(some, dtype=float).T
        mean = running_mean(y, max(5, len(y) // 30))
        names = {} if means else {"raw": "each step", "mean": "running mean"}
        means += mean.tolist()
        axes.plot(*thinned(x, y), color=BLUE, alpha=0.4, linewidth=0.7, label=names.get("raw"))
        mark = "o" if len(x) == 1 else ""
        axes.plot(*thinned(x, mean), color=BLUE, linewidth=1.8, marker=mark, markersize=5, label=names.get("mean"))
    if means and min(means) > 0 and max(means) / min(means) > WIDE:
        axes.set_yscale("log")
    axes.set_ylabel("loss", fontsize=10)


def _rate(axes: Any, rows: Sequence[Row]) -> None:
    peaks = []
    for _, group in groupby(rows, lambda row: row["stage"]):
        x, y = np.array([(r["step"], r["lr"] or 0.0) for r in group], dtype=float).T
        peaks.append(y.max())
        axes.plot(*thinned(x, y), color=ORANGE, linewidth=1.4, marker="o" if len(x) == 1 else "", markersize=5)
    if min(peaks) > 0 and max(peaks) / min(peaks) > WIDE:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(peaks) / 100)
    else:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        axes.yaxis.get_offset_text().set_fontsize(8)
    axes.set_ylabel("learning\nrate", fontsize=10)


def _scores(axes: Any, rows: Sequence[Row], scores: Sequence[Curve], words: str) -> None:
    """A line for each score: filled marks for the weights, hollow for their EMA; dashed: at the start; star: the best."""
    kinds: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("current", "", {"marker": "o"}),
        ("ema", ", EMA", {"marker": "s", "linestyle": (0, (5, 1)), "markerfacecolor": "white"}),
    )
    for score in scores:
        for weights, ending, style in kinds:
            if some := _points([r for r in rows if r["weights"] == weights], score):
                x, y = zip(*some, strict=True)
                size = 4.5 if len(some) <= 40 else 0
                name = f"{score.name}{ending}"
                axes.plot(x, y, color=score.colour, linewidth=1.5, markersize=size, label=name, **style)
        for _, start in _points([r for r in rows if r["weights"] == "start"], score)[-1:]:
            name = f"{score.name} at the start"
            axes.axhline(start, color=score.colour, linestyle=(0, (2, 2)), linewidth=1.2, label=name)
    best = [p for s in scores for p in _points([r for r in rows if r["best"]][-1:], s)]
    if best:
        x, y = zip(*best, strict=True)
        axes.plot(x, y, marker="*", markersize=12, color="black", linestyle="none", zorder=5, label="best")
    values = [y for s in scores for _, y in _points(rows, s)]
    if scores == list(KL) and min(values, default=0) > 0 and max(values) / min(values) > WIDE:
        axes.set_yscale("log")
    axes.set_ylabel(words, fontsize=10)


def _points(rows: Sequence[Row], score: Curve) -> list[tuple[int, float]]:
    return [(r["step"], r[score.field]) for r in rows if r[score.field] is not None and math.isfinite(r[score.field])]


def running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and `window` // 2 neighbours on each side, fewer at the ends."""
    at, half = np.arange(len(y)), window // 2
    begins, ends = np.maximum(0, at - half), np.minimum(len(y), at + half + 1)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    return (sums[ends] - sums[begins]) / (ends - begins)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about `POINTS` points: of each bin of neighbours the minimum and the maximum, in their order."""
    size = 2 * len(x) // POINTS
    if size < 3:
        return x, y
    bins = np.array_split(np.arange(len(x)), len(x) // size)
    some = np.unique([i for b in bins for i in (b[0] + y[b].argmin(), b[0] + y[b].argmax())])
    return x[some], y[some]
