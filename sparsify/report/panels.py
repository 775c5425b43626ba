"""Small pictures without words: the keys of a query, the tokens that go on, a query's place; over the photograph.

Each is an RGB array [h * cell, w * cell, 3] of uint8, `cell` pixels a patch. What is drawn in words beside them is the
caller's (`sparsify.report.profile.attention`, `sparsify.report.page`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from sparsify.images.photograph import Photograph
from sparsify.measure.inspection import Inspection, Layer, Survivors

Array = np.ndarray
COLOURS = "plasma"  # of attention; matplotlib's, lightness rises with the value
DARKEST = 0.22  # where of it the colours begin: what is below is hardly seen on a dimmed photograph
SPAN = 100.0  # the strongest attention over the weakest that still has a colour of its own


class Scale(NamedTuple):
    """Attention from `low` (and below) to `high`, logarithmic; from 0 to 1."""

    low: float
    high: float

    def place(self, weight: Array) -> Array:
        """Where weights stand between `low` and `high`, 0 to 1."""
        low, high = math.log(self.low), math.log(self.high)
        return np.clip((np.log(np.maximum(weight, 1e-30)) - low) / (high - low), 0, 1)


def scale_of(found: Inspection, layers: tuple[int, ...], heads: tuple[int, ...]) -> Scale:
    """One scale for all panels of an image: up to the strongest attention that a patch is given in them."""
    P = len(found.prefix)
    some = [layer for layer in found.layers if layer.block in layers and layer.tokens > P]
    high = max((float(layer.weight[list(heads), :, P:].max()) for layer in some), default=1.0)
    high = min(1.0, max(high, 1e-6))
    return Scale(high / SPAN, high)


def colours(share: Array) -> Array:
    """RGB from 0 to 1, [..., 3], of values from 0 to 1."""
    from matplotlib import colormaps

    return np.asarray(colormaps[COLOURS](DARKEST + (1 - DARKEST) * np.asarray(share)))[..., :3]


def cell_size(grid: tuple[int, int], side: int) -> int:
    """Pixels of a patch, so that the longer side of a panel has about `side`."""
    return max(3, round(side / max(grid)))


def keys(photo: Photograph, found: Inspection, layer: Layer, head: int, query: int, scale: Scale, cell: int) -> Array:
    """The keys that a query keeps in one head, coloured by the attention they are given, over the dimmed photograph.

    Tokens that were merged are coloured on all their patches; patches that have left are darker; the query has a frame.

    Args:
        head, query: counted from 0; query: of `found.queries`.
    """
    P, owner = len(found.prefix), layer.owner.numpy()
    kept, weight = layer.kept[head, query].numpy(), layer.weight[head, query].numpy()  # (N)
    there = owner >= 0
    at = np.where(there, owner, 0) + P
    on = (kept[at] & there) if len(kept) > P else np.zeros_like(there)
    value = np.where(on, weight[np.minimum(at, len(weight) - 1)], 0)
    base = _dimmed(_photo(photo, found.grid, cell))
    base = np.where(_wide(there, found.grid, cell), base, 0.4 * base)
    colour = _wide(colours(scale.place(value)), found.grid, cell)
    picture = np.where(_wide(on, found.grid, cell), 0.86 * colour + 0.14 * base, base)
    if _merged(owner):
        _outline(picture, owner, found.grid, cell, np.array([0.0, 0.0, 0.0]), 0.55)
    patch = found.queries[query]
    row = owner[patch]
    _frame(picture, owner == row if row >= 0 else np.arange(len(owner)) == patch, found.grid, cell)
    return _bytes(picture)


def tokens(photo: Photograph, found: Inspection, stage: Survivors, cell: int) -> Array:
    """The tokens behind a stage: dropped patches dark, merged ones in their mean colour and with an outline."""
    owner = stage.owner.numpy()
    picture = _photo(photo, found.grid, cell)
    there = owner >= 0
    if _merged(owner):
        mean = _group_means(picture, owner, found.grid, cell)  # (n0, 3)
        counts = np.bincount(owner[there], minlength=1)
        many = there & (counts[np.where(there, owner, 0)] > 1)
        picture = np.where(_wide(many, found.grid, cell), 0.3 * picture + 0.7 * _wide(mean, found.grid, cell), picture)
        _outline(picture, owner, found.grid, cell, np.array([1.0, 1.0, 1.0]), 0.9)
    picture = np.where(_wide(there, found.grid, cell), picture, 0.25 * _dimmed(picture))
    return _bytes(picture)


def place(photo: Photograph, found: Inspection, cell: int, queries: tuple[int, ...] = ()) -> Array:
    """The photograph as the model sees it, the patches of some queries (counted from 0) framed."""
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


def _merged(owner: Array) -> bool:
    there = owner[owner >= 0]
    return len(there) > len(np.unique(there))


def _group_means(picture: Array, owner: Array, grid: tuple[int, int], cell: int) -> Array:
    """The mean colour of each patch's token, [n0, 3]."""
    patch = picture.reshape(grid[0], cell, grid[1], cell, 3).mean((1, 3)).reshape(-1, 3)  # (n0, 3)
    at, tokens = np.where(owner >= 0, owner, 0), int(owner.max(initial=0)) + 1
    weight = (owner >= 0).astype(float)
    sums = np.stack([np.bincount(at, weight * patch[:, c], tokens) for c in range(3)], -1)
    return (sums / np.maximum(np.bincount(at, weight, tokens), 1)[:, None])[at]


def _outline(picture: Array, owner: Array, grid: tuple[int, int], cell: int, colour: Array, alpha: float) -> None:
    """Lines between patches of different tokens, where one of both was merged; in place."""
    there = owner >= 0
    counts = np.bincount(owner[there], minlength=1)
    many = (there & (counts[np.where(there, owner, 0)] > 1)).reshape(grid)
    square, width = owner.reshape(grid), max(1, round(cell / 14))
    line = np.zeros(picture.shape[:2], dtype=bool)
    for i in range(1, grid[0]):
        cut = (square[i] != square[i - 1]) & (many[i] | many[i - 1])
        line[i * cell - width // 2 : i * cell - width // 2 + width] |= cut.repeat(cell)
    for j in range(1, grid[1]):
        cut = (square[:, j] != square[:, j - 1]) & (many[:, j] | many[:, j - 1])
        line[:, j * cell - width // 2 : j * cell - width // 2 + width] |= cut.repeat(cell)[:, None]
    picture[line] = alpha * colour + (1 - alpha) * picture[line]


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
    edge = np.zeros_like(wide)  # at the rim of the picture the frame lies inside, or it would be lost
    edge[1 : 1 + thick], edge[-1 - thick : -1], edge[:, 1 : 1 + thick], edge[:, -1 - thick : -1] = (
        True,
        True,
        True,
        True,
    )
    picture[(edge & wide)[1:-1, 1:-1]] = 1.0


def _bytes(picture: Array) -> Array:
    return np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)
