"""Labels beside the points of a plot that hide neither points nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

DISTANCES = (7, 15, 25, 37, 51, 67, 85, 105)  # points (1/72 inch) between a point and its label, tried in this order
DIRECTIONS = ((0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0))
LEADER = 15  # points; a line leads from a label at this distance to its point
SIZE = 7.5  # of the font


class Box(NamedTuple):
    """A rectangle; y grows upward."""

    left: float
    bottom: float
    right: float
    top: float


class Label(NamedTuple):
    """A text for the point x, y of the data."""

    x: float
    y: float
    text: str
    colour: str


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    inside: Box,
    unit: float = 1.0,
) -> list[tuple[Box, float]]:
    """A box and its distance from the anchor for each label, from left to right the first that is free.

    Args:
        anchors: points, pixels. sizes: width and height of the labels, pixels.
        taken: boxes that stay free. inside: what no label leaves.
        unit: pixels of a point (1/72 inch), the unit of `DISTANCES`.

    Where no box is free, the one that covers least is taken.
    """
    used, found = list(taken), [(Box(0, 0, 0, 0), 0.0)] * len(anchors)
    for i in sorted(range(len(anchors)), key=lambda i: anchors[i]):
        choices = [(_beside(anchors[i], sizes[i], way, away * unit), away) for away in DISTANCES for way in DIRECTIONS]
        costs = [_outside(box, inside) + sum(_common(box, other) for other in used) for box, _ in choices]
        box, away = choices[int(np.argmin(costs))]  # the first of the least
        used.append(box)
        found[i] = (box, float(away))
    return found


def draw(axes: Any, labels: Sequence[Label], others: Sequence[tuple[float, float]] = (), marker: float = 7.0) -> None:
    """Labels in `axes` of matplotlib, whose limits and place in the figure are final; `others` are more points to keep free.

    `marker` is the size of a point's symbol, in points (1/72 inch).
    """
    if not labels:
        return
    figure = axes.figure
    renderer, unit = figure.canvas.get_renderer(), figure.dpi / 72
    points = axes.transData.transform([(each.x, each.y) for each in labels])
    half = marker * unit / 2
    rest = axes.transData.transform(list(others)) if others else np.empty((0, 2))
    taken = [Box(x - half, y - half, x + half, y + half) for x, y in [*points, *rest]]
    texts = [axes.annotate(each.text, (each.x, each.y), fontsize=SIZE, color=each.colour) for each in labels]
    extents = [text.get_window_extent(renderer) for text in texts]
    bounds = axes.get_window_extent(renderer)
    anchors = [(float(x), float(y)) for x, y in points]
    sizes = [(extent.width + 2 * unit, extent.height + 2 * unit) for extent in extents]
    placed = place(anchors, sizes, taken, Box(bounds.x0, bounds.y0, bounds.x1, bounds.y1), unit)
    for text, label, (x, y), (box, away) in zip(texts, labels, anchors, placed, strict=True):
        text.remove()
        middle = ((box.left + box.right) / 2 - x, (box.bottom + box.top) / 2 - y)
        line = dict(arrowstyle="-", color=label.colour, linewidth=0.5, alpha=0.7, shrinkA=0, shrinkB=0)
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(middle[0] / unit, middle[1] / unit),
            textcoords="offset points",
            fontsize=SIZE,
            color=label.colour,
            ha="center",
            va="center",
            arrowprops=line if away >= LEADER else None,
            bbox=dict(boxstyle="square,pad=0.1", facecolor="white", edgecolor="none", alpha=0.85),
            zorder=6,
            parse_math=False,
        ).set_in_layout(False)


def _beside(anchor: tuple[float, float], size: tuple[float, float], way: tuple[int, int], away: float) -> Box:
    """The box of that size whose nearest edge is `away` from the anchor, in direction `way`."""
    (x, y), (width, height) = anchor, size
    left = x - width / 2 if not way[0] else x + away if way[0] > 0 else x - away - width
    bottom = y - height / 2 if not way[1] else y + away if way[1] > 0 else y - away - height
    return Box(left, bottom, left + width, bottom + height)


def _common(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.top, b.top) - max(a.bottom, b.bottom)
    return max(0.0, width) * max(0.0, height)


def _outside(box: Box, inside: Box) -> float:
    """Area of `box` outside `inside`, which counts ten times: a cut label cannot be read."""
    return 10 * ((box.right - box.left) * (box.top - box.bottom) - _common(box, inside))
