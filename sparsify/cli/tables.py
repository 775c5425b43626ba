"""Results as rich renderables, made to read well at 80 columns, without colour and in a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsify.cli import terminal
from sparsify.measure.profile import Profile
from sparsify.report import accuracy
from sparsify.report import profile as report


def show(what: RenderableType) -> None:
    """Print to standard output; in a pipe or a file nothing is wrapped, cut or coloured."""
    terminal.console().print(what)


def profile_table(profile: Profile) -> Group:
    """Theoretical MACs with their breakdown; then, where something was measured, time, memory and a plain verdict."""
    parts: list[RenderableType] = [
        Text(f"{report.THEORETICAL} ({_pixels(profile)})", style="italic"),
        _table(report.headline(profile)),
        *(Text(line, style="dim") for line in report.remarks(profile)),
    ]
    warning = report.uncounted(profile.unsupported)
    if warning:
        parts.append(Text(warning, style="bold red"))
    verdict = Text(report.verdict(profile), style="bold")
    if profile.measured is not None:
        parts += [
            Text(),
            Text("Measured", style="italic"),
            _table(report.measured(profile)),
            Text(report.conditions(profile), style="dim"),
            verdict,
            *(Text(line) for line in report.auto(profile)),
        ]
    elif verdict:
        parts.append(verdict)
    return Group(*parts)


def module_tree(profile: Profile, *, full: bool = False) -> Group:
    """MACs by module, dense beside sparse, children indented under their parent.

    Neighbouring blocks with the same figures share one set of rows, unless `full`.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("module", no_wrap=True, overflow="ellipsis", ratio=1)
    for heading in ("params", "dense", "sparse", "change"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=7)  # '821.6 k': a long name gives way
    for label, row in tree_rows(profile, full=full):
        same = row["macs_dense"] == row["macs_sparse"]
        name = Text("  " * row["depth"] + label, style="dim" if same else "")
        table.add_row(name, report.human(row["params"]), *report.module_cells(row, report.human))
    return Group(Text(f"{report.THEORETICAL}, by module", style="italic"), table)


def tree_rows(profile: Profile, *, full: bool = False) -> list[tuple[str, Mapping[str, Any]]]:
    """Label and row of each line of the tree; `full` as in `module_tree`."""
    subtrees: list[list[Mapping[str, Any]]] = []  # of the children of `blocks`; every other row stands alone
    for row in profile.modules:
        parts = row["name"].split(".")
        if len(parts) > 2 and parts[0] == "blocks":
            subtrees[-1].append(row)
        else:
            subtrees.append([row])
    lines: list[tuple[str, Mapping[str, Any]]] = []
    i = 0
    while i < len(subtrees):
        alike = 1
        if not full and subtrees[i][0]["name"].startswith("blocks."):
            while i + alike < len(subtrees) and _figures(subtrees[i + alike]) == _figures(subtrees[i]):
                alike += 1
        for row in subtrees[i]:
            label = _label(row)
            if alike > 1 and row is subtrees[i][0]:
                last = subtrees[i + alike - 1][0]["name"].rpartition(".")[2]
                label = f"{row['name'].rpartition('.')[2]}-{last}: {alike} alike, each {row['type']}"
            lines.append((label, row))
        i += alike
    return lines


def eval_table(result: Mapping[str, Any]) -> Group:
    """Accuracy of the sparse model beside the dense one; `result`: see `sparsify.report.accuracy`."""
    pairs = _table(accuracy.pairs(result))
    singles = Table(box=None, pad_edge=False, show_header=False)
    singles.add_column()
    singles.add_column(justify="right")
    for row in accuracy.singles(result):
        singles.add_row(*row)
    parts: list[RenderableType] = [Text(accuracy.HEADING, style="italic")]
    parts += [table for table in (pairs, singles) if table.row_count]
    if warning := accuracy.broken(result):
        parts.append(Text(warning, style="bold red"))
    return Group(*parts)


def _table(rows: list[report.Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "dense", "sparse", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['name'].rpartition('.')[2]} {row['type']}".strip()


def _figures(rows: list[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What makes two blocks alike: everything but their names."""
    root = rows[0]["name"]
    return [(r["name"].removeprefix(root), *(v for k, v in r.items() if k != "name")) for r in rows]


def _pixels(profile: Profile) -> str:
    height, width = profile.conditions["img_size"]
    return f"{height}x{width} pixels"
