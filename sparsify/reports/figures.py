"""The pictures of `sparsify show` as PNGs: keys of a query, remaining tokens, kept fraction of the attention."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsify.errors import BadFile, one_line
from sparsify.files.outputs import write_all
from sparsify.measure.inspection import Inspection, Shown
from sparsify.reports import captions, drawing, panels

SIDE = 280  # pixels of a panel, about
INCH = 1.75  # width of a panel
INK, EMPTY = "0.35", "0.92"  # greys of explanations, and of cells without a number
SHARES = "viridis"  # colours of the kept share


def draw(shown: Sequence[Shown], progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, bytes]:
    """PNGs by file name: NAME.keys-1.png and so on by query, NAME.tokens.png if tokens are removed, NAME.mass.png."""
    made: dict[str, bytes] = {}
    for i, each in enumerate(shown):
        progress(i, len(shown))
        for query in range(len(each.found.queries)):
            made[f"{each.name}.keys-{query + 1}.png"] = keys(each, query)
        if each.found.stages:
            made[f"{each.name}.tokens.png"] = tokens(each)
        made[f"{each.name}.mass.png"] = mass(each)
    progress(len(shown), len(shown))
    return made


def keys(shown: Shown, query: int) -> bytes:
    """The keys of one query (counted from 0), by layer and head: a PNG."""
    found, photo = shown.found, shown.photo
    cell = panels.cell_size(found.grid, SIDE)
    scale = panels.scale_of(found, shown.layers, shown.heads)
    tall = found.grid[0] / found.grid[1]
    margin, gap, about, head_room, words_room = 0.15, 0.12, 0.85, 0.78, 0.3  # inches
    side = margin + INCH + about  # where the panels begin
    across = max(side + (INCH + gap) * len(shown.heads) - gap + margin, 4.4)
    legend = textwrap.wrap(_key_legend(found), 33)
    column = INCH * tall + 1.2 + 0.125 * len(legend)
    down = head_room + max((INCH * tall + words_room) * len(shown.layers), column) + 0.1
    figure = drawing.figure(across, down)

    def box(x: float, y: float, width: float, height: float) -> Any:
        """Axes by their upper left corner, from that of the figure, in inches."""
        axes = figure.add_axes((x / across, 1 - (y + height) / down, width / across, height / down))
        axes.set_axis_off()
        return axes

    def write(x: float, y: float, text: str, size: float, **how: Any) -> None:
        figure.text(x / across, 1 - y / down, text, fontsize=size, parse_math=False, **{"va": "top", **how})

    drawing.title(figure, f"{photo.name}: the keys that a patch attends to")
    for i, block in enumerate(shown.layers):
        layer, y = found.layer(block), head_room + i * (INCH * tall + words_room)
        about_layer = "not computed"
        if layer is not None:
            kept = f"{captions.budgets(layer)} keys" if layer.sparse else "dense"
            about_layer = f"{layer.tokens} tokens\n{kept}"
        middle = y + INCH * tall / 2
        write(side - gap, middle, f"layer {block + 1}", 10, ha="right", va="bottom")
        write(side - gap, middle + 0.03, about_layer, 7.5, ha="right", color=INK, linespacing=1.3)
        for j, head in enumerate(shown.heads):
            x = side + j * (INCH + gap)
            axes = box(x, y, INCH, INCH * tall)
            if i == 0:
                axes.set_title(f"head {head + 1}", fontsize=10, pad=5)
            if layer is None:
                axes.set_axis_on()
                axes.set(facecolor=EMPTY, xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                axes.text(0.5, 0.5, "not computed", ha="center", va="center", fontsize=8, color=INK)
                continue
            axes.imshow(panels.keys(photo, found, layer, head, query, scale, cell), aspect="auto")
            elsewhere = captions.panel(found, layer, head, query)
            write(x + INCH / 2, y + INCH * tall + 0.05, elsewhere, 7.5, ha="center")
    y = head_room
    axes = box(margin, y, INCH, INCH * tall)
    axes.imshow(panels.view(photo, found, cell, (query,)), aspect="auto")
    axes.set_title(f"query {query + 1} of {len(found.queries)}", fontsize=10, pad=5)
    y += INCH * tall
    write(margin, y + 0.06, captions.where(shown, query), 7.5, color=INK)
    write(margin, y + 0.42, "attention given to a key", 7.5)
    _bar(box(margin, y + 0.6, INCH, 0.11), scale)
    write(margin, y + 1.02, "\n".join(legend), 7.5, color=INK, linespacing=1.3)
    return drawing.png(figure)


def tokens(shown: Shown) -> bytes:
    """The tokens after each stage, of which there is at least one: a PNG."""
    found, photo = shown.found, shown.photo
    cell, count = panels.cell_size(found.grid, SIDE), 1 + len(found.stages)
    columns = min(count, 5 if count > 8 else 4)
    rows, tall, side = math.ceil(count / columns), found.grid[0] / found.grid[1], 2.0
    figure = drawing.figure((side + 0.12) * columns + 0.2, 0.5 + (side * tall + 0.42) * rows + 0.35)
    drawing.title(figure, f"{photo.name}: tokens that go on")
    width, height = figure.get_size_inches()
    patches = found.grid[0] * found.grid[1]
    panels_of = [(panels.view(photo, found, cell), "as the model sees it", f"{patches} patches")]
    for stage in found.stages:
        picture = panels.tokens(photo, found, stage, cell)
        panels_of.append((picture, f"after layer {stage.block + 1}", captions.stage(stage)))
    for i, (picture, title, words) in enumerate(panels_of):
        x = (0.16 + (side + 0.12) * (i % columns)) / width
        y = 1 - (0.5 + (side * tall + 0.42) * (i // columns) + 0.22 + side * tall) / height
        axes = figure.add_axes((x, y, side / width, side * tall / height))
        axes.imshow(picture, aspect="auto")
        axes.set_axis_off()
        axes.set_title(title, fontsize=10, pad=3)
        axes.text(0.5, -0.03, words, ha="center", va="top", fontsize=7.5, color=INK, transform=axes.transAxes)
    legend = "Dark: dropped patches. Outlined, in their mean colour: patches that became one token."
    figure.text(0.16 / width, 0.1 / height, legend, fontsize=7.5, color=INK, va="bottom")
    return drawing.png(figure)


def mass(shown: Shown) -> bytes:
    """A PNG: the fraction of the true attention on the kept keys, and the best one for as many keys, by layer and head."""
    from matplotlib import colormaps

    found = shown.found
    value, best, dense = mass_table(found)
    across = min(0.85, max(0.44, 3.4 / found.heads))
    down, left, right, top, bottom = 0.4, 1.0, 0.3, 1.0, 0.88
    width, height = max(left + across * found.heads + right, 4.3), top + down * found.depth + bottom
    figure = drawing.figure(width, height)
    drawing.title(figure, f"{shown.photo.name}: attention kept, %")
    axes = figure.add_axes((left / width, bottom / height, across * found.heads / width, down * found.depth / height))
    cells = colormaps[SHARES](np.nan_to_num(value))
    cells[np.isnan(value) | dense[:, None]] = (*[float(EMPTY)] * 3, 1)
    axes.imshow(cells, aspect="auto")
    for i in range(found.depth):
        for j in range(found.heads):
            alone = dense[i] or np.isnan(value[i, j])
            style = {"ha": "center", "va": "center_baseline", "color": INK if alone else ink_on(cells[i, j, :3])}
            share = "–" if np.isnan(value[i, j]) else f"{100 * value[i, j]:.0f}"
            axes.text(j, i if alone else i - 0.1, share, fontsize=9.5, **style)
            if not alone:
                axes.text(j, i + 0.3, f"of {100 * best[i, j]:.0f}", fontsize=6, **style)
    axes.set_xticks(range(found.heads), [str(j + 1) for j in range(found.heads)], fontsize=9)
    names = [f"{'dense  ' if dense[i] else ''}{i + 1}" for i in range(found.depth)]
    axes.set_yticks(range(found.depth), names, fontsize=9)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("head", fontsize=10)
    axes.set_ylabel("layer", fontsize=10)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(found.heads + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(found.depth + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    lines = ["Of: the most that as many keys could hold.", *textwrap.wrap(captions.true_attention(found.reference), 62)]
    if np.isnan(value).any():
        lines.insert(1, "–: only the prefix tokens' rows are computed.")
    at = {"x": 0.15 / width, "y": 0.14 / height}
    figure.text(**at, s="\n".join(lines), fontsize=7.5, color=INK, va="bottom", linespacing=1.3)
    return drawing.png(figure)


def mass_table(found: Inspection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kept and best shares, [depth, H] each, NaN if patch rows are not computed; which layers are dense, bool [depth]."""
    value = np.full((found.depth, found.heads), np.nan)
    best, dense = value.copy(), np.zeros(found.depth, dtype=bool)
    for layer in found.layers:
        value[layer.block], best[layer.block] = layer.mass.numpy(), layer.best.numpy()
        dense[layer.block] = not layer.sparse
    return value, best, dense


def ink_on(rgb: np.ndarray) -> str:
    """Black or white, whichever reads better on a colour (0 to 1)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "black" if float(linear @ np.array([0.2126, 0.7152, 0.0722])) > 0.179 else "white"


def _key_legend(found: Inspection) -> str:
    words = "White frame: the query. Colours: the keys it keeps. Grey: the others."
    tail = any(bool((layer.tail > 0).any()) for layer in found.layers)
    prefix = f"{', '.join(dict.fromkeys(found.prefix))}: prefix token" if found.prefix else ""
    rest = "tail: means of the dropped keys" if tail else ""
    beneath = ". ".join(part for part in (prefix, rest) if part)
    return f"{words} Beneath: attention given elsewhere. {beneath}." if beneath else words


def _bar(axes: Any, scale: panels.Scale) -> None:
    """The colours of attention, with three ticks."""
    axes.set_axis_on()
    axes.imshow(panels.colours(np.linspace(0, 1, 256))[None], aspect="auto", extent=(0, 1, 0, 1))
    at = [0, 0.5, 1]
    marks = [scale.low * (scale.high / scale.low) ** x for x in at]
    axes.set_xticks(at, [captions.percent(mark) for mark in marks], fontsize=7)
    axes.set_yticks([])
    for text, how in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
        text.set_horizontalalignment(how)
    axes.tick_params(length=2, pad=2)
    axes.spines[:].set_visible(False)


def write(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write them, all or none, into a folder that is made if missing; raises `BadFile` if that fails."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise BadFile(f"cannot make {folder}: {one_line(error)}") from error
    write_all({folder / name: content for name, content in files.items()})
    return [folder / name for name in files]
