"""`sparsify report`: one HTML page with everything known about a file.

The page loads nothing from the network: it contains its pictures and style, has no scripts, and its content security policy
forbids both. Jinja escapes every text.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsify.measure.figures import Profile
from sparsify.measure.inspection import Inspection, Shown
from sparsify.models.checkpoint import Header
from sparsify.reports import accuracy, captions, figures, header, panels, profile, words
from sparsify.reports.readback import SweepFiles
from sparsify.reports.words import NOTHING, mapping
from sparsify.version import __version__

SIDE = 280  # pixels of a panel, which is shown at half that size or smaller
LARGE = 448  # of the photograph


@dataclass(frozen=True)
class Content:
    """What a page shows; a part that is None or empty is left out, with a line that says how to get it."""

    file: Path  # the model's
    header: Header
    profile: Profile  # MACs, and what was measured, if anything was
    evaluation: Mapping[str, Any] | None = None  # of eval's results file
    sweep: SweepFiles | None = None
    shown: Sequence[Shown] = ()  # what the model does with images

    @property
    def images(self) -> str:
        """'1 image' or '5 images'."""
        return "1 image" if len(self.shown) == 1 else f"{len(self.shown)} images"


def render(content: Content) -> str:
    """The page, HTML."""
    sweep = content.sweep
    return words.rendered(
        "page.html.jinja",
        content=content,
        figures=content.profile,
        file=content.file.name,
        version=__version__,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        tiles=_tiles(content),
        swept_on="" if sweep is None else words.publishable(str(sweep.figures.get("data", ""))),
        timed_on="" if sweep is None else _timed_on(mapping(sweep.figures.get("conditions"))),
        sweep_picture=None if sweep is None or sweep.picture is None else _uri(sweep.picture, "png"),
        pictures=[_picture(each) for each in content.shown],
        mass_legend=_mass_legend(content.shown),
        # modules whose words the template asks for
        header=header,
        profile=profile,
        accuracy=accuracy,
        words=words,
    )


def parts(content: Content) -> list[str]:
    """What is on the page, in words."""
    named = ["settings", "MACs"]
    named += ["time"] if content.profile.measured else []
    named += ["accuracy"] if content.evaluation is not None else []
    named += ["sweep"] if content.sweep is not None else []
    return named + ([content.images] if content.shown else [])


def _tiles(c: Content) -> list[tuple[str, str, str]]:
    """The figures at the top: figure, what, theoretical or measured."""
    p, tiles = c.profile, []
    if p.macs_dense:
        tiles.append((_signed(words.change(p.macs_dense, p.macs_sparse)), "MACs of the model", "theoretical"))
    if p.mhsa_macs_dense:
        figure = _signed(words.change(p.mhsa_macs_dense, p.mhsa_macs_sparse))
        tiles.append((figure, "MACs of the attention", "theoretical"))
    m = p.measured
    if m is not None and m.dense is not None:
        same = "; within the spread" if m.dense.overlaps(m.sparse) else ""
        what = f"the speed of dense, batch {p.batch_size}{same}"
        tiles.append((f"{m.dense.median / m.sparse.median:.2f}×", what, "measured"))
    e = c.evaluation or {}
    if e.get("top1") is not None and e.get("dense_top1") is not None:
        tiles.append((_signed(f"{e['top1'] - e['dense_top1']:+.2f}"), "points of top-1", "measured"))
    if e.get("agreement") is not None:
        tiles.append((f"{e['agreement']:.1f} %", "same answer as dense", "measured"))
    if e.get("correlation") is not None:
        tiles.append((f"{e['correlation']:.3f}", "correlation with dense", "measured"))
    sparse = [layer for each in c.shown for layer in each.found.layers if layer.sparse]
    if sparse:
        mean = sum(float(layer.mass.mean()) for layer in sparse) / len(sparse)
        tiles.append((captions.percent(mean), f"of the true attention kept, {c.images}", "measured"))
    return tiles


def _signed(text: str) -> str:
    return text.replace("-", "−", 1)


def _timed_on(c: Mapping[str, Any]) -> str:
    parts = [str(c.get("device_name", "")), words.threads(c["threads"]) if c.get("threads") else ""]
    parts += [str(c.get("dtype", "")), f"batch {c['batch_size']}" if c.get("batch_size") else ""]
    return ", ".join(part for part in (*parts, f"{c['runs']} runs in turns" if c.get("runs") else "") if part)


def _picture(shown: Shown) -> dict[str, Any]:
    found, photo = shown.found, shown.photo
    small, large = panels.cell_size(found.grid, SIDE), panels.cell_size(found.grid, LARGE)
    scale = panels.scale_of(found, shown.layers, shown.heads)
    every = tuple(range(len(found.queries)))
    steps = ", ".join(_css(colour) for colour in panels.colours(np.linspace(0, 1, 9)))
    stages = [
        (_jpeg(panels.tokens(photo, found, stage, small)), f"after layer {stage.block + 1}", captions.stage(stage))
        for stage in found.stages
    ]
    queries = [
        (captions.where(shown, query), [_layer(shown, block, query, scale, small) for block in shown.layers])
        for query in every
    ]
    return {
        "name": photo.name,
        "about": captions.mass(found),
        "photo": _jpeg(panels.view(photo, found, large, every)),
        "stages": stages,
        "gradient": f"linear-gradient(to right, {steps})",
        "scale": [captions.percent(value) for value in (scale.low, (scale.low * scale.high) ** 0.5, scale.high)],
        "queries": queries,
        "mass": _mass(found),
    }


def _layer(shown: Shown, block: int, query: int, scale: panels.Scale, cell: int) -> dict[str, Any]:
    layer, heads = shown.found.layer(block), []
    if layer is not None:
        for head in shown.heads:
            picture = panels.keys(shown.photo, shown.found, layer, head, query, scale, cell)
            heads.append((_jpeg(picture), f"head {head + 1}", captions.panel(shown.found, layer, head, query)))
    return {"name": f"Layer {block + 1}", "about": captions.layer(layer), "heads": heads}


def _mass(found: Inspection) -> list[list[tuple[str, str, str]]]:
    """The kept share by layer and head: the figure, the best possible, and the cell's style."""
    from matplotlib import colormaps

    value, best, dense = figures.mass_table(found)

    def cell(i: int, j: int) -> tuple[str, str, str]:
        if np.isnan(value[i, j]):
            return NOTHING, "", ""
        share = f"{100 * value[i, j]:.0f}"
        if dense[i]:
            return share, "dense", ""
        rgb = np.asarray(colormaps[figures.SHARES](value[i, j]))[:3]
        return share, f"of {100 * best[i, j]:.0f}", f"background: {_css(rgb)}; color: {figures.ink_on(rgb)}"

    return [[cell(i, j) for j in range(found.heads)] for i in range(found.depth)]


def _mass_legend(shown: Sequence[Shown]) -> str:
    if not shown:
        return ""
    legend = f"{captions.true_attention(shown[0].found.reference)}. Of: the most that as many keys could hold."
    missing = any(len(each.found.layers) < each.found.depth for each in shown)
    return legend + (f" {NOTHING}: only the prefix tokens' rows are computed." if missing else "")


def _jpeg(picture: np.ndarray) -> tuple[str, int, int]:
    """Data URI, width and height."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=84, subsampling=0, optimize=True)
    return _uri(file.getvalue(), "jpeg"), picture.shape[1], picture.shape[0]


def _uri(content: bytes, format: str) -> str:
    return f"data:image/{format};base64,{base64.b64encode(content).decode()}"


def _css(rgb: np.ndarray) -> str:
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in rgb)
