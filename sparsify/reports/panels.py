"""Small pictures without text: the keys of a query, the remaining tokens, the queries; over the photograph.

Each is an RGB array [h * cell, w * cell, 3] of uint8, `cell` pixels a patch. `sparsify.reports.figures` and
`sparsify.reports.page` add the text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from sparsify.images.photograph import Photograph
from sparsify.measure.inspection import Inspection, Layer, Survivors

Array = np.ndarray
COLOURS = "plasma"  # of attention: matplotlib's, lightness rises with the value
DARKEST = 0.22  # first colour that is used: darker ones are hardly visible on a dimmed photograph
SPAN = 100.0  # ratio of the strongest attention to the weakest with a colour of its own


class Scale(NamedTuple):
    """Logarithmic scale of attention weights, `low` to `high`, both from 0 to 1."""

    low: float
    high: float

    def place(self, weight: Array) -> Array:
        """Positions of weights between `low` (0) and `high` (1), clipped."""
        low, high = math.log(self.low), math.log(self.high)
        return np.clip((np.log(np.maximum(weight, 1e-30)) - low) / (high - low), 0, 1)


def scale_of(found: Inspection, layers: tuple[int, ...], heads: tuple[int, ...]) -> Scale:
    """One scale for all panels of an image: up to the strongest attention to a patch in them."""
    P = len(found.prefix)
    drawn = [layer for layer in found.layers if layer.block in layers and layer.tokens > P]
    high = max((float(layer.weight[list(heads), :, P:].max()) for layer in drawn), default=1.0)
    high = min(1.0, max(high, 1e-6))
    return Scale(high / SPAN, high)


def colours(position: Array) -> Array:
    """RGB, 0 to 1, [..., 3] of positions on the scale, [...]."""
    from matplotlib import colormaps

    return np.asarray(colormaps[COLOURS](DARKEST + (1 - DARKEST) * np.asarray(position)))[..., :3]


def cell_size(grid: tuple[int, int], side: int) -> int:
    """Pixels of a patch, so that the longer side of a panel has about `side`."""
    return max(3, round(side / max(grid)))


def keys(photo: Photograph, found: Inspection, layer: Layer, head: int, query: int, scale: Scale, cell: int) -> Array:
    """The keys that a query keeps in one head, coloured by the attention they are given, over the dimmed photograph.

    Merged tokens are coloured on all their patches; dropped patches are darker; the query has a frame.

    Args:
        head, query: counted from 0; query: of `found.queries`.
    """
    P, owner = len(found.prefix), layer.owner.numpy()
    kept, weight = layer.kept[head, query].numpy(), layer.weight[head, query].numpy()  # (N)
    present = owner >= 0
    token = np.where(present, owner, 0) + P
    on = (kept[token] & present) if len(kept) > P else np.zeros_like(present)
    value = np.where(on, weight[np.minimum(token, len(weight) - 1)], 0)
    base = _dimmed(_photo(photo, found.grid, cell))
    base = np.where(_wide(present, found.grid, cell), base, 0.4 * base)
    colour = _wide(colours(scale.place(value)), found.grid, cell)
    picture = np.where(_wide(on, found.grid, cell), 0.86 * colour + 0.14 * base, base)
    _outline(picture, owner, found.grid, cell, 0.0, 0.55)
    patch = found.queries[query]
    inside = owner == owner[patch] if owner[patch] >= 0 else np.arange(len(owner)) == patch
    _frame(picture, inside, found.grid, cell)
    return _bytes(picture)


def tokens(photo: Photograph, found: Inspection, stage: Survivors, cell: int) -> Array:
    """The tokens after a stage: dropped patches dark, merged ones in their mean colour and with an outline."""
    owner = stage.owner.numpy()
    picture = _photo(photo, found.grid, cell)
    merged = _merged(owner)
    if merged.any():
        mean = _group_means(picture, owner, found.grid, cell)  # (n0, 3)
        blend = 0.3 * picture + 0.7 * _wide(mean, found.grid, cell)
        picture = np.where(_wide(merged, found.grid, cell), blend, picture)
        _outline(picture, owner, found.grid, cell, 1.0, 0.9)
    return _bytes(np.where(_wide(owner >= 0, found.grid, cell), picture, 0.25 * _dimmed(picture)))


def view(photo: Photograph, found: Inspection, cell: int, queries: tuple[int, ...] = ()) -> Array:
    """The photograph as the model sees it, with frames around the patches of `queries` (indices of `found.queries`)."""
    picture = _photo(photo, found.grid, cell)
    for query in queries:
        _frame(picture, np.arange(found.grid[0] * found.grid[1]) == found.queries[query], found.grid, cell)
    return _bytes(picture)


def _photo(photo: Photograph, grid: tuple[int, int], cell: int) -> Array:
    """The view, [h * cell, w * cell, 3], from 0 to 1."""
    size = (grid[1] * cell, grid[0] * cell)
    return np.asarray(Image.fromarray(photo.view).resize(size, Image.Resampling.LANCZOS)).astype(np.float32) / 255


def _dimmed(picture: Array) -> Array:
    grey = picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return np.repeat((0.1 + 0.5 * grey)[..., None], 3, -1)


def _wide(values: Array, grid: tuple[int, int], cell: int) -> Array:
    """Values of the patches, [n0] or [n0, 3], on all their pixels: [h * cell, w * cell, 1 or 3]."""
    square = values.reshape(*grid, -1)
    return square.repeat(cell, 0).repeat(cell, 1)


def _merged(owner: Array) -> Array:
    """Patches whose token has other patches too: bool [n0]."""
    present = owner >= 0
    counts = np.bincount(owner[present], minlength=1)
    return present & (counts[np.where(present, owner, 0)] > 1)


def _group_means(picture: Array, owner: Array, grid: tuple[int, int], cell: int) -> Array:
    """The mean colour of each patch's token, [n0, 3]."""
    patch = picture.reshape(grid[0], cell, grid[1], cell, 3).mean((1, 3)).reshape(-1, 3)  # (n0, 3)
    at, tokens = np.where(owner >= 0, owner, 0), int(owner.max(initial=0)) + 1
    weight = (owner >= 0).astype(float)
    sums = np.stack([np.bincount(at, weight * patch[:, c], tokens) for c in range(3)], -1)
    return (sums / np.maximum(np.bincount(at, weight, tokens), 1)[:, None])[at]


def _outline(picture: Array, owner: Array, grid: tuple[int, int], cell: int, grey: float, alpha: float) -> None:
    """Lines between patches of different tokens, at least one of them merged; in place."""
    many = _merged(owner).reshape(grid)
    square, width = owner.reshape(grid), max(1, round(cell / 14))
    line = np.zeros(picture.shape[:2], dtype=bool)
    for lines, tokens_of, merged in ((line, square, many), (line.T, square.T, many.T)):  # between rows; between columns
        for i in range(1, len(tokens_of)):
            cut = (tokens_of[i] != tokens_of[i - 1]) & (merged[i] | merged[i - 1])
            lines[i * cell - width // 2 : i * cell - width // 2 + width] |= cut.repeat(cell)
    picture[line] = alpha * grey + (1 - alpha) * picture[line]


def _frame(picture: Array, inside: Array, grid: tuple[int, int], cell: int) -> None:
    """A white frame with a black one around it, around patches `inside` [n0]; in place."""
    wide = np.pad(_wide(inside, grid, cell)[..., 0].astype(bool), 1)
    thick = max(1, round(cell / 11))
    grown = wide.copy()
    for colour in (1.0, 0.0):
        before = grown.copy()
        for _ in range(thick):
            step = grown.copy()
            step[1:] |= grown[:-1]
            step[:-1] |= grown[1:]
            step[:, 1:] |= grown[:, :-1]
            step[:, :-1] |= grown[:, 1:]
            grown = step
        picture[(grown & ~before)[1:-1, 1:-1]] = colour
    edge = np.ones_like(wide)  # along the border of the picture the frame lies inside: it would be invisible otherwise
    edge[1 + thick : -1 - thick, 1 + thick : -1 - thick] = False
    picture[(edge & wide)[1:-1, 1:-1]] = 1.0


def _bytes(picture: Array) -> Array:
    return np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)
