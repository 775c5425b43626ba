"""The job behind `sparsify show` and the pictures of `sparsify report`: image files -> what the model does with each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from sparsify import extras
from sparsify.errors import UsageError, field
from sparsify.files.destinations import check_folder
from sparsify.images import datasets, photograph
from sparsify.images.decode import lost
from sparsify.images.photograph import ImagePoint
from sparsify.measure.inspection import Shown, inspect
from sparsify.nn import attention, graft, hosts
from sparsify.nn.attention import check_sparse
from sparsify.processes import Listener

MOST_LAYERS, MOST_HEADS = 4, 6  # drawn by default


@dataclass(frozen=True)
class Views:
    """What is looked at; see `look`."""

    images: Sequence[Path]
    points: Sequence[ImagePoint] = ()
    layers: str | None = None
    heads: str | None = None


@dataclass(frozen=True)
class Pictures:
    """What a model does with images, and the pictures of it."""

    shown: tuple[Shown, ...]  # one for each image
    files: Mapping[str, bytes]  # PNGs by file name
    paths: tuple[Path, ...] = ()  # of the files written


def show(
    model: nn.Module,
    views: Views,
    output: Path | None = None,
    dense: nn.Module | None = None,
    listener: Listener = Listener(),
) -> Pictures:
    """Draws what a sparse model does with each image, into the folder `output`, if one is given.

    Raises as `look`; `BadFile`: a folder that cannot be written.
    """
    from sparsify.reports import figures

    extras.need("a picture", "matplotlib")
    if output is not None:
        check_folder(output)
    shown = seen(model, views, dense, listener)
    files = figures.draw(shown, partial(listener.progress, "draw"))
    return Pictures(tuple(shown), files, () if output is None else tuple(figures.write(files, output)))


def seen(model: nn.Module, views: Views, dense: nn.Module | None, listener: Listener) -> list[Shown]:
    """`look` at all of `views`."""
    progress, how = partial(listener.progress, "look"), {"layers": views.layers, "heads": views.heads}
    return look(model, views.images, views.points, dense=dense, progress=progress, say=listener.say, **how)


def look(
    model: nn.Module,
    images: Sequence[Path],
    points: Sequence[ImagePoint] = (),
    *,
    layers: str | None = None,
    heads: str | None = None,
    dense: nn.Module | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Shown]:
    """Looks at what a sparse model does with each image.

    Args:
        points: queries in each image; none: `sparsify.measure.inspection.default_queries`.
        layers, heads: numbers from 1 separated by commas, or all; None: evenly spaced, at most `MOST_LAYERS` of the layers
            with sparse attention (of all, if none has) and `MOST_HEADS` heads.
        dense: see `sparsify.measure.inspection.inspect`.
        progress: called with images done and their total.
        say: called with a line about what pixels of the images lost.

    Raises:
        BadData: an image that cannot be read.
        UsageError: a point outside an image, a layer or head that does not exist, a dense model that does not fit.
        SparsifyError: not a sparse model.
    """
    check_sparse(model)
    if dense is not None:
        graft.check_original(dense, model)
    modules = list(attention.attention_modules(model).values())
    sparse = [i for i, name in enumerate(attention.attention_modules(model)) if name in attention.sparse_modules(model)]
    some = sparse or list(range(len(modules)))
    blocks = _chosen(layers, "layer", len(modules), [some[i] for i in spread(len(some), MOST_LAYERS)])
    count = modules[0].num_heads
    drawn = _chosen(heads, "head", count, spread(count, MOST_HEADS))
    config, grid = datasets.data_config(model), hosts.patch_grid(model)
    photos = [photograph.read(path, config) for path in images]
    if counts := Counter(loss for photo in photos for loss in photo.losses):
        say(lost(counts))
    asked = [tuple(dict.fromkeys(photo.patch(point, grid) for point in points)) for photo in photos]
    names = unique([path.stem for path in images])
    shown = []
    for i, (name, photo, patches) in enumerate(zip(names, photos, asked, strict=True)):
        progress(i, len(photos))
        shown.append(Shown(name, photo, inspect(model, photo.x, patches, dense), blocks, drawn))
    progress(len(photos), len(photos))
    return shown


def spread(n: int, most: int) -> list[int]:
    """At most `most` of 0 to n - 1, evenly spaced, the first and the last among them."""
    return list(range(n)) if n <= most else [round(i * (n - 1) / (most - 1)) for i in range(most)]


def unique(names: Sequence[str]) -> list[str]:
    """The names, with -2, -3, ... where two are the same but for case, which some file systems do not tell apart."""
    chosen: dict[str, str] = {}
    for name in names:
        new, number = name, 1
        while new.lower() in chosen:
            number += 1
            new = f"{name}-{number}"
        chosen[new.lower()] = new
    return list(chosen.values())


def _chosen(text: str | None, option: str, count: int, default: Sequence[int]) -> tuple[int, ...]:
    """'1,12' or 'all' -> indices from 0, each once, in order."""
    if text is None:
        return tuple(default)
    if text.strip() == "all":
        return tuple(range(count))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 1 <= int(part) <= count for part in parts):
        expected = f"numbers from 1 to {count} separated by commas, or all, are expected ({option}s)"
        raise UsageError(f"{field(option)} {text}: {expected}")
    return tuple(sorted({int(part) - 1 for part in parts}))
