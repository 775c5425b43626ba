"""Figures as words: counts, times, memory, changes, conditions, names; templates and tables in Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify.measure.latency import Timing

Row = tuple[str, str, str, str]  # what, dense, sparse, change
HEADINGS = ("", "dense", "sparse", "change")
NOTHING = "–"  # in the place of a missing figure
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)
# what begins something in Markdown; of underscores those at the edge of a word, of colons and dots those of addresses
_MARKS = re.compile(r"[\\`*\[\]#|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.", re.IGNORECASE)
_AT_START = re.compile(r"^(\s*\d*)((?<!\d)[-+=](?!\d)|(?<=\d)[.)](?=\s|$))")


def human(count: float) -> str:
    """A count with 4 significant digits and its unit: 4608338304 -> '4.608 G', 357663744 -> '357.7 M', 12 -> '12'."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size * 0.99995:
            digits = max(0, 4 - len(f"{abs(count) / size:.0f}"))
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.4g}"


def plain(value: float) -> str:
    """A measured value with 4 significant digits and no exponent: 12345.6 -> '12346', 0.012345 -> '0.01234'."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def memory(size: float) -> str:
    """Bytes as MB or GB (powers of ten): 24871312 -> '24.87 MB'."""
    text = human(size)
    return text.replace(" k", " kB").replace(" M", " MB").replace(" G", " GB") if " " in text else f"{text} B"


def number(value: Any, form: str, missing: str = NOTHING) -> str:
    """A number in a format of Python's; `missing` for None and anything else that is no number."""
    return format(value, form) if isinstance(value, int | float) else missing


def spread(timing: Timing | None) -> str:
    """'9.12-11.3': 10th to 90th percentile, ms."""
    return NOTHING if timing is None else f"{plain(timing.p10)}-{plain(timing.p90)}"


def change(dense: float | None, sparse: float) -> str:
    """Relative change from dense to sparse: '-70.1 %'; a change too small for that keeps its sign: '-0.04 %'.

    A dash if there is no dense figure, '' if it is 0.
    """
    if dense is None:
        return NOTHING
    if not dense:
        return ""
    percent = 100 * (sparse - dense) / dense
    if percent == 0:
        return "0 %"
    return f"{percent:+.1f} %" if abs(percent) >= 0.1 else f"{percent:+.2g} %"


def rectangle(sides: Sequence[int]) -> str:
    """(14, 14) -> '14x14'."""
    return "x".join(map(str, sides))


def cells(grids: Sequence[Sequence[int]]) -> str:
    """Grids of cells of the heads of a layer: '4x3', or their numbers where they differ, '1 to 30'."""
    counts = sorted(rows * columns for rows, columns in grids)
    return rectangle(grids[0]) if len(set(grids)) == 1 else f"{counts[0]} to {counts[-1]}"


def threads(count: int) -> str:
    """'1 thread' or '8 threads'."""
    return "1 thread" if count == 1 else f"{count} threads"


def device(conditions: Mapping[str, Any]) -> str:
    """The device's name, and torch's word for it unless it is the CPU."""
    name = str(conditions["device_name"])
    return name if conditions["device"] == "cpu" else f"{name} ({conditions['device']})"


def timed_on(where: str, c: Mapping[str, Any], runs: str, backend: str, unit: str = "") -> str:
    """The device `where` and the other conditions `c` of a measurement, in one line; `unit` of the image size."""
    return (
        f"{where}, {threads(c['threads'])}, {c['dtype']}, batch {c['batch_size']}, {rectangle(c['img_size'])}{unit}, "
        f"{runs}, backend {backend}, torch {c['torch']}, timm {c['timm']}"
    )


def publishable(name: str, parts: int = 2) -> str:
    """The name of a data set or model as a file may tell it: of a path the last `parts` parts.

    '/home/me/photos/val' -> 'photos/val'
    """
    known = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    return "/".join(known[-parts:]) or name


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` from a file if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


class Markdown(str):
    """Text in Markdown; any other text is escaped before it becomes part of Markdown."""


def markdown(text: Any) -> Markdown:
    """Plain text as Markdown on one line: no link, image, heading, list, table cell or HTML comes of it."""
    if isinstance(text, Markdown):
        return text
    escaped = html.escape(re.sub(" {2,}", " ", _verbatim(text)), quote=False)  # an indented line would be code
    escaped = _MARKS.sub(r"\\\g<0>", escaped)
    return Markdown(_AT_START.sub(r"\1\\\2", escaped))


def _verbatim(text: Any) -> Markdown:
    """`text` for a block of code: on one line, without control characters."""
    return Markdown(_CONTROL.sub(" ", str(text)))


def _code(text: Any) -> Markdown:
    """A name as code; escaped text where it is no plain name."""
    return Markdown(f"`{text}`") if _PLAIN.fullmatch(str(text)) else markdown(text)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Markdown:
    """A Markdown table; all but the first `left` columns are aligned to the right. Cells are escaped."""
    rule = [Markdown("---" if i < left else "---:") for i in range(len(headings))]
    return Markdown("\n".join(f"| {' | '.join(map(markdown, cells))} |" for cells in (headings, rule, *rows)))


def rendered(template: str, **context: Any) -> str:
    """A template of this package, NAME.html.jinja or NAME.md.jinja, with its values, each escaped for that format.

    In Markdown `table` is `markdown_table`; the filter `code` shows a name as code, `verbatim` leaves a text as it is.
    """
    from jinja2 import Environment, StrictUndefined

    to_html = ".html" in template
    environment = Environment(
        autoescape=to_html,
        finalize=None if to_html else markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(code=_code, verbatim=_verbatim)
    text = (resources.files("sparsify.reports") / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(table=markdown_table, **context) + "\n"
