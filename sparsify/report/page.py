"""`sparsify report`: one HTML page with everything known of a file.

It asks nothing of the network: pictures and style are in it, there are no scripts, and a policy in its head forbids both.
Every word goes through Jinja's escaping.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsify.measure.figures import Profile
from sparsify.measure.inspection import Inspection, Shown
from sparsify.models.checkpoint import Header
from sparsify.report import accuracy, captions, figures, panels
from sparsify.report import header as facts
from sparsify.report import profile as report
from sparsify.report.readback import SweepFiles
from sparsify.report.words import NOTHING, change, human
from sparsify.version import __version__

SIDE = 280  # pixels of a panel; on the page it takes half as many or fewer
LARGE = 448  # of the photograph and of the tokens
TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Content:
    """What a page shows; None or nothing: the part is left out, with a line that says how to get it.

    Attributes:
        file: the model's; header: what it says of itself.
        profile: MACs, and what was measured, if anything was.
        evaluation: of eval's results file; sweep: of a sweep's files.
        shown: what the model does with images.
    """

    file: Path
    header: Header
    profile: Profile
    evaluation: Mapping[str, Any] | None = None
    sweep: SweepFiles | None = None
    shown: Sequence[Shown] = ()


def render(content: Content) -> str:
    """The page, HTML."""
    from jinja2 import Environment, StrictUndefined

    text = (resources.files("sparsify.report") / TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render(**_context(content)) + "\n"


def parts(content: Content) -> list[str]:
    """What is on the page, in words."""
    found = ["settings", "MACs"]
    found += ["time"] if content.profile.measured else []
    found += ["accuracy"] if content.evaluation is not None else []
    found += ["sweep"] if content.sweep is not None else []
    return found + ([_images(content)] if content.shown else [])


def _images(content: Content) -> str:
    return "1 image" if len(content.shown) == 1 else f"{len(content.shown)} images"


def _context(c: Content) -> dict[str, Any]:
    p = c.profile
    return {
        "title": facts.title(c.header), "file": c.file.name, "version": __version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "tiles": _tiles(c), "origin": facts.origin(c.header, c.file), "settings": facts.settings(c.header.config),
        "theoretical": report.THEORETICAL, "pixels": "x".join(map(str, p.conditions["img_size"])),
        "headline": report.headline(p), "remarks": report.remarks(p), "uncounted": report.uncounted(p.unsupported),
        "shares": _shares(p), "tokens": _tokens(p), "tree": _tree(p),
        "no_dense": report.NO_DENSE if p.macs_dense is None else "",
        "measured": report.measured(p), "conditions": report.conditions(p) if p.measured else "",
        "verdict": report.verdict(p) if p.measured else "", "auto": report.auto(p), "not_speed": report.NOT_SPEED,
        "accuracy": _accuracy(c.evaluation), "sweep": _sweep(c.sweep), "pictures": [_picture(each) for each in c.shown],
        "mass_legend": _mass_legend(c.shown),
    }  # fmt: skip


def _tiles(c: Content) -> list[tuple[str, str, str]]:
    """The figures at the top: figure, what, kind."""
    p, found = c.profile, []
    if p.macs_dense:
        found.append((_signed(change(p.macs_dense, p.macs_sparse)), "MACs of the model", "theoretical"))
    if p.mhsa_macs_dense:
        found.append((_signed(change(p.mhsa_macs_dense, p.mhsa_macs_sparse)), "MACs of the attention", "theoretical"))
    m = p.measured
    if m is not None and m.dense is not None:
        same = m.dense.p10 <= m.sparse.p90 and m.sparse.p10 <= m.dense.p90
        words = f"the speed of dense, batch {p.batch_size}{'; within the spread' if same else ''}"
        found.append((f"{m.dense.median / m.sparse.median:.2f}×", words, "measured"))
    e = c.evaluation or {}
    if e.get("top1") is not None and e.get("dense_top1") is not None:
        found.append((_signed(f"{e['top1'] - e['dense_top1']:+.2f}"), "points of top-1", "measured"))
    if e.get("agreement") is not None:
        found.append((f"{e['agreement']:.1f} %", "same answer as dense", "measured"))
    sparse = [layer for each in c.shown for layer in each.found.layers if layer.sparse]
    if sparse:
        mean = sum(float(layer.mass.mean()) for layer in sparse) / len(sparse)
        some = _images(c)
        found.append((captions.percent(mean), f"of the true attention kept, {some}", "measured"))
    return found


def _signed(text: str) -> str:
    return text.replace("-", "−", 1)


def _shares(p: Profile) -> list[tuple[str, float]]:
    """MACs left, of the whole model and of its attention, in percent of dense; none where there is no dense model."""
    if not p.macs_dense or not p.mhsa_macs_dense:
        return []
    return [
        ("whole model", 100 * p.macs_sparse / p.macs_dense),
        ("attention (MHSA)", 100 * p.mhsa_macs_sparse / p.mhsa_macs_dense),
    ]


def _tokens(p: Profile) -> list[tuple[int, float]]:
    """Tokens into each layer, and their share of the first's in percent; none where all stay."""
    counts = [before for before, _ in p.tokens]
    if len({*counts, p.tokens[-1][1]}) == 1:
        return []
    return [(count, 100 * count / counts[0]) for count in counts]


def _tree(p: Profile) -> list[tuple[int, str, str, str, str]]:
    return [(row["depth"], label or "model", *report.module_cells(row, human)) for label, row in report.tree_rows(p)]


def _accuracy(e: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if e is None:
        return None
    words = [accuracy.conditions(e)]
    if e.get("model"):
        words.append(f"results of the model called {e['model']}")
    return {
        "pairs": accuracy.pairs(e), "singles": [row for row in accuracy.singles(e) if row[0] != "images"],
        "conditions": ", ".join(words), "broken": accuracy.broken(e),
    }  # fmt: skip


def _sweep(sweep: SweepFiles | None) -> dict[str, Any] | None:
    if sweep is None:
        return None
    tree, rows = sweep.figures, []
    for each in tree["settings"]:
        rows.append((
            f"{'keep' if each.get('kind') == 'keep' else 'target'} {each.get('asked', '')}",
            f"{100 * each['macs_share']:.1f}",
            _form(each.get("top1"), ".2f"), _form(each.get("agreement"), ".2f"), f"{each['speed']:.2f}×",
        ))  # fmt: skip
    c = tree.get("conditions")
    c = c if isinstance(c, Mapping) else {}
    threads = "1 thread" if c.get("threads") == 1 else f"{c['threads']} threads" if c.get("threads") else ""
    timed = [
        str(c.get("device_name", "")), threads, str(c.get("dtype", "")),
        f"batch {c['batch_size']}" if c.get("batch_size") else "", f"{c['runs']} runs in turns" if c.get("runs") else "",
    ]  # fmt: skip
    return {
        "model": tree.get("model", ""), "images": tree.get("images", ""), "data": _place(tree.get("data", "")), "rows": rows,
        "dense_top1": _form(_mapping(tree["dense"]).get("top1"), ".2f"), "timed": ", ".join(part for part in timed if part),
        "picture": None if sweep.picture is None else _uri(sweep.picture, "png"),
    }  # fmt: skip


def _place(data: Any) -> str:
    """Where the images lie, without the folders above: a page goes to people whom they do not concern."""
    return "/".join(Path(str(data)).parts[-2:]) if Path(str(data)).is_absolute() else str(data)


def _picture(shown: Shown) -> dict[str, Any]:
    found, photo = shown.found, shown.photo
    small, large = panels.cell_size(found.grid, SIDE), panels.cell_size(found.grid, LARGE)
    scale = panels.scale_of(found, shown.layers, shown.heads)
    every = tuple(range(len(found.queries)))
    steps = ", ".join(_css(colour) for colour in panels.colours(np.linspace(0, 1, 9)))
    return {
        "name": photo.path.name, "about": captions.mass(found), "width": photo.width, "height": photo.height,
        "photo": _jpeg(panels.place(photo, found, large, every)),
        "stages": [
            (_jpeg(panels.tokens(photo, found, stage, small)), f"behind layer {stage.block + 1}", captions.stage(stage))
            for stage in found.stages
        ],
        "gradient": f"linear-gradient(to right, {steps})",
        "scale": [captions.percent(value) for value in (scale.low, (scale.low * scale.high) ** 0.5, scale.high)],
        "queries": [
            {
                "name": f"Query {query + 1}", "where": captions.where(shown, query),
                "layers": [_layer(shown, block, query, scale, small) for block in shown.layers],
            }
            for query in every
        ],
        "mass": _mass(found),
    }  # fmt: skip


def _layer(shown: Shown, block: int, query: int, scale: panels.Scale, cell: int) -> dict[str, Any]:
    layer, heads = shown.found.layer(block), []
    if layer is not None:
        for head in shown.heads:
            picture = panels.keys(shown.photo, shown.found, layer, head, query, scale, cell)
            heads.append((_jpeg(picture), f"head {head + 1}", captions.panel(shown.found, layer, head, query)))
    return {"name": f"Layer {block + 1}", "about": captions.layer(layer), "heads": heads}


def _mass(found: Inspection) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Rows of the kept share: the layer, and for each head the figure, the best one, and the cell's style."""
    from matplotlib import colormaps

    value, best, dense = figures.mass_table(found)
    rows = []
    for i in range(found.depth):
        cells: list[tuple[str, str, str]] = []
        for j in range(found.heads):
            if np.isnan(value[i, j]):
                cells.append((NOTHING, "", ""))
            elif dense[i]:
                cells.append((f"{100 * value[i, j]:.0f}", "dense", ""))
            else:
                rgb = np.asarray(colormaps[figures.SHARES](value[i, j]))[:3]
                style = f"background: {_css(rgb)}; color: {figures.ink_on(rgb)}"
                cells.append((f"{100 * value[i, j]:.0f}", f"of {100 * best[i, j]:.0f}", style))
        rows.append((str(i + 1), cells))
    return rows


def _mass_legend(shown: Sequence[Shown]) -> str:
    if not shown:
        return ""
    words = f"{captions.true_attention(shown[0].found.reference)}. Of: the most that as many keys could hold."
    missing = any(len(each.found.layers) < each.found.depth for each in shown)
    return words + (f" {NOTHING}: only the prefix tokens' rows are computed." if missing else "")


def _jpeg(picture: np.ndarray) -> tuple[str, int, int]:
    """Data URI, width and height."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=84, subsampling=0, optimize=True)
    return _uri(file.getvalue(), "jpeg"), picture.shape[1], picture.shape[0]


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _css(rgb: np.ndarray) -> str:
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in rgb)


def _form(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else NOTHING


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
