"""The picture of a sweep: accuracy over MACs and over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.measure.accuracy import Evaluation
from sparsify.measure.sweep import Sweep
from sparsify.report.drawing import BLUE, GREEN, GREY, ORANGE
from sparsify.report.published import PUBLISHED_DENSE_TOP1, Point, published


def plot(sweep: Sweep, path: Path) -> None:
    """Two panels: accuracy (or agreement, or cosine) over MACs left, and over time left; PNG, 1600 pixels wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    field, words, dense = _axis(sweep.settings[0].evaluation)
    figure = Figure(figsize=(8, 4.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for kind, name, marker, colour in (
        ("keep", "sparse attention, all tokens", "o", BLUE),
        ("macs", "searched schedule: fewer tokens and keys", "s", ORANGE),
    ):
        some = sorted((s for s in sweep.settings if s.choice.kind == kind), key=lambda s: s.share)
        if not some:
            continue
        y = [getattr(s.evaluation, field) for s in some]
        style: dict[str, Any] = dict(marker=marker, markersize=6, linewidth=1.4, color=colour)
        left.plot([100 * s.share for s in some], y, label=name, **style)
        if field == "top1":
            error = [top1_error(s.evaluation) for s in some]
            left.errorbar([100 * s.share for s in some], y, yerr=error, ecolor=colour, fmt="none", elinewidth=0.8)
        x = [100 / s.speed.median for s in some]
        low, high = [100 / s.speed.p90 for s in some], [100 / s.speed.p10 for s in some]
        spread = [[m - a for m, a in zip(x, low, strict=True)], [b - m for m, b in zip(x, high, strict=True)]]
        right.errorbar(x, y, xerr=spread, elinewidth=1, capsize=2.5, **style)
    for axes in (left, right):
        axes.plot([100], [dense], marker="*", markersize=13, color="black", linestyle="none", label="dense", zorder=5)
    if points := published(sweep):
        _draw_published(left, points, dense)
    left.set_xlabel("MACs left, % of dense (theoretical)", fontsize=10)
    right.set_xlabel("time left, % of dense (measured, p10 to p90)", fontsize=10)
    left.set_ylabel(words, fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.tick_params(labelsize=9)
        axes.axvline(100, color="0.6", linestyle=":", linewidth=1, zorder=0)
        axes.margins(0.07, 0.09)
        axes.ticklabel_format(useOffset=False)
        axes.spines[["top", "right"]].set_visible(False)
    c = sweep.conditions
    threads = "1 thread" if c["threads"] == 1 else f"{c['threads']} threads"
    figure.suptitle(
        f"{sweep.model} at {c['img_size'][0]} px, not trained: {sweep.settings[0].evaluation.images:,} images; "
        f"{threads}, {c['dtype']}, batch {c['batch_size']}",
        fontsize=10.5,
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.savefig(path, format="png")


def _draw_published(axes: Any, points: Sequence[Point], dense: float) -> None:
    """Placed by what they lose against their own dense model, which is the same on ImageNet's validation set."""
    for name, marker, colour, some in (
        (
            "published, fine-tuned: Sparsifiner, loss against its dense",
            "^",
            GREEN,
            [p for p in points if p.token_keep == 1],
        ),
        ("published, fine-tuned: pruned tokens, likewise", "v", GREY, [p for p in points if p.token_keep < 1]),
    ):
        axes.plot(
            [100 * p.macs_share for p in some], [dense + p.top1 - PUBLISHED_DENSE_TOP1 for p in some], marker=marker,
            markersize=5.5, linestyle="none", markerfacecolor="none", color=colour, label=name,
        )  # fmt: skip


def top1_error(e: Evaluation) -> float | None:
    """Standard error of the change in top-1 against dense, points: the images are the same, so only flips count."""
    if e.images_lost is None or e.images_gained is None or not e.images:
        return None
    lost, gained, n = e.images_lost, e.images_gained, e.images
    return 100 * max(0.0, lost + gained - (lost - gained) ** 2 / n) ** 0.5 / n


def _axis(e: Evaluation) -> tuple[str, str, float]:
    """Field of the evaluation on the y axis, its name, and the dense model's value."""
    if e.top1 is not None:
        return "top1", "top-1, % (bars: standard error)", e.dense_top1 or 0.0
    if e.agreement is not None:
        return "agreement", "agreement with dense, %", 100.0
    return "cosine_pooled", "cosine similarity to dense (pooled features)", 1.0
