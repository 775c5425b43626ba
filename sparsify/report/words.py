"""Numbers as words: counts, times, memory, changes; rows of tables."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(headings: tuple[str, ...], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table; all but the first `left` columns are aligned to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(headings))]
    return [f"| {' | '.join(cells)} |" for cells in (headings, tuple(rule), *rows)]


Row = tuple[str, str, str, str]  # what, dense, sparse, change


NOTHING = "–"  # a figure that there is not


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


def change(dense: float | None, sparse: float) -> str:
    """Relative change from dense to sparse: '-70.1 %'; a change too small for that keeps its sign: '-0.04 %'.

    A dash where there is no dense figure, '' where it is 0.
    """
    if dense is None:
        return NOTHING
    if not dense:
        return ""
    percent = 100 * (sparse - dense) / dense
    if percent == 0:
        return "0 %"
    return f"{percent:+.1f} %" if abs(percent) >= 0.1 else f"{percent:+.2g} %"
