"""The plot of a sweep: accuracy over MACs and over time, with the published results for DeiT-S (`published.yaml`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import yaml

from sparsify.measure.accuracy import Evaluation
from sparsify.measure.sweep import Setting, Sweep
from sparsify.reports import drawing, labels, words

SERIES = (
    ("keep", "sparse attention, all tokens", "o", drawing.BLUE),
    ("macs", "searched schedule: fewer tokens and keys", "s", drawing.ORANGE),
)

PUBLISHED_DENSE_MHSA, PUBLISHED_DENSE_GMACS, PUBLISHED_DENSE_TOP1 = 357.66, 4.599, 79.82


class PublishedResult(NamedTuple):
    """A published result for DeiT-S at 224 pixels, fine-tuned. MHSA in the authors' accounting."""

    model: str
    token_keep: float
    keep: float
    mhsa_mmacs: float
    top1: float
    macs_share: float  # of the whole model


def label(setting: Setting) -> str:
    """'keep 0.1' or 'target 0.7'."""
    return f"{'keep' if setting.choice.kind == 'keep' else 'target'} {setting.choice.asked:g}"


def plot(sweep: Sweep) -> bytes:
    """Accuracy (or agreement, or cosine) over MACs, and over time, both in percent of dense: a PNG, 1600 pixels wide."""
    field, y_label, dense = _axis(sweep.settings[0].evaluation)
    figure = drawing.figure(8, 4.4, 200, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    named: dict[Any, list[labels.Label]] = {left: [], right: []}
    for kind, name, marker, colour in SERIES:
        settings = sorted((s for s in sweep.settings if s.choice.kind == kind), key=lambda s: s.share)
        if not settings:
            continue
        macs, times = [100 * s.share for s in settings], [100 / s.speed.median for s in settings]
        y = [getattr(s.evaluation, field) for s in settings]
        style: dict[str, Any] = dict(marker=marker, markersize=6, linewidth=1.4, color=colour)
        left.plot(macs, y, label=name, **style)
        if field == "top1":
            error = [top1_error(s.evaluation) for s in settings]
            left.errorbar(macs, y, yerr=error, ecolor=colour, fmt="none", elinewidth=0.8)
        below = [x - 100 / s.speed.p90 for x, s in zip(times, settings, strict=True)]
        above = [100 / s.speed.p10 - x for x, s in zip(times, settings, strict=True)]
        right.errorbar(times, y, xerr=[below, above], elinewidth=1, capsize=2.5, **style)
        for axes, xs in ((left, macs), (right, times)):
            named[axes] += [labels.Label(x, at, label(s), colour) for x, at, s in zip(xs, y, settings, strict=True)]
    for axes in (left, right):
        axes.plot([100], [dense], marker="*", markersize=13, color="black", linestyle="none", label="dense", zorder=5)
    others = _draw_published(left, published(sweep), dense)
    left.set_xlabel("MACs left, % of dense (theoretical)", fontsize=10)
    right.set_xlabel("time left, % of dense (measured, p10 to p90)", fontsize=10)
    left.set_ylabel(y_label, fontsize=10)
    for axes in (left, right):
        drawing.tidy(axes)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.axvline(100, color="0.6", linestyle=":", linewidth=1, zorder=0)
        axes.margins(0.07, 0.14)
        axes.ticklabel_format(useOffset=False)
    c = sweep.conditions
    figure.suptitle(
        f"{sweep.model} at {c['img_size'][0]} px, not trained: {sweep.settings[0].evaluation.images:,} images; "
        f"{words.threads(c['threads'])}, {c['dtype']}, batch {c['batch_size']}",
        fontsize=10.5,
    )
    handles, legend = left.get_legend_handles_labels()
    figure.legend(handles, legend, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.draw_without_rendering()  # from here on the axes stay where they are
    figure.set_layout_engine("none")
    labels.draw(left, named[left], [(100, dense), *others])
    labels.draw(right, named[right], [(100, dense)])
    return drawing.png(figure)


def published(sweep: Sweep) -> list[PublishedResult]:
    """The paper's figures if they are of the swept model: DeiT-S at 224 pixels with ImageNet's classes and labels.

    The paper gives the attention's MACs alone. Fraction of the whole model: 1 - (dense MHSA - MHSA) / 4.599 G; where tokens
    are pruned, the total that the same formulae give over 4.599 G.
    """
    deit = sweep.architecture == "deit_small_patch16_224" and sweep.classes == 1000
    if not (deit and sweep.labelled and sweep.conditions["img_size"] == [224, 224]):
        return []
    results = []
    rows = yaml.safe_load((resources.files("sparsify.reports") / "published.yaml").read_text(encoding="utf-8"))
    for model, token_keep, keep, mhsa, top1, gmacs in rows:
        total = PUBLISHED_DENSE_GMACS - (PUBLISHED_DENSE_MHSA - mhsa) / 1000 if gmacs is None else gmacs
        results.append(PublishedResult(model, token_keep, keep, mhsa, top1, total / PUBLISHED_DENSE_GMACS))
    return results


def _draw_published(axes: Any, points: Sequence[PublishedResult], dense: float) -> list[tuple[float, float]]:
    """Placed by what they lose against their own dense model, which is the same on ImageNet's validation set.

    Returns the points of the plot.
    """
    drawn: list[tuple[float, float]] = []
    for name, marker, colour, group in (
        ("Sparsifiner, loss against its dense", "^", drawing.GREEN, [p for p in points if p.token_keep == 1]),
        ("pruned tokens, likewise", "v", drawing.GREY, [p for p in points if p.token_keep < 1]),
    ):
        style = dict(marker=marker, markersize=5.5, linestyle="none", markerfacecolor="none", color=colour)
        at = [(100 * p.macs_share, dense + p.top1 - PUBLISHED_DENSE_TOP1) for p in group]
        if at:
            axes.plot(*zip(*at, strict=True), label=f"published, fine-tuned: {name}", **style)
        drawn += at
    return drawn


def top1_error(e: Evaluation) -> float | None:
    """Standard error of the change in top-1 against dense, in points; on the same images only flips count."""
    if e.images_lost is None or e.images_gained is None or not e.images:
        return None
    lost, gained, n = e.images_lost, e.images_gained, e.images
    return 100 * max(0.0, lost + gained - (lost - gained) ** 2 / n) ** 0.5 / n


def _axis(e: Evaluation) -> tuple[str, str, float]:
    """Field of the evaluation on the y axis, its label, and the dense model's value."""
    if e.top1 is not None:
        return "top1", "top-1, % (bars: standard error)", e.dense_top1 or 0.0
    if e.agreement is not None:
        return "agreement", "agreement with dense, %", 100.0
    if e.cosine_pooled is None:
        return "correlation", "correlation with dense", 1.0
    return "cosine_pooled", "cosine similarity to dense (pooled features)", 1.0
