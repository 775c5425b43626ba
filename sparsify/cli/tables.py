"""Results as rich renderables, made to read well at 80 columns, without colour and in a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsify.cli import terminal
from sparsify.measure.figures import Profile
from sparsify.measure.sweep import Sweep
from sparsify.report import accuracy, words
from sparsify.report import profile as report
from sparsify.report.profile import tree_rows
from sparsify.report.sweep import conditions, label, quality, seen


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
    for name_, row in tree_rows(profile, full=full):
        same = row["macs_dense"] == row["macs_sparse"]
        name = Text("  " * row["depth"] + name_, style="dim" if same else "")
        table.add_row(name, words.human(row["params"]), *report.module_cells(row, words.human))
    return Group(Text(f"{report.THEORETICAL}, by module", style="italic"), table)


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


def _table(rows: list[words.Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "dense", "sparse", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _pixels(profile: Profile) -> str:
    height, width = profile.conditions["img_size"]
    return f"{height}x{width} pixels"


def table(sweep: Sweep) -> Group:
    """All settings beside dense, in 80 columns."""
    one = sweep.settings[0]
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    headings = ["", "MACs", "change", "MHSA", *(name for name, _, _ in quality(one.evaluation)), "speed", "p10-p90"]
    for heading in headings:  # 78 columns where they are full
        short = {"lost/gained": "-/+"}.get(heading, heading.removesuffix(" %"))
        shown.add_column(short, justify="right" if heading else "left", no_wrap=True)
    dense = [cell for _, cell, _ in quality(one.evaluation)]
    shown.add_row("dense", words.human(one.profile.dense.macs), "", "", *dense, "1.00x", "")
    for s in sweep.settings:
        p, speed = s.profile, s.speed
        shown.add_row(
            label(s),
            words.human(p.macs_sparse),
            words.change(p.dense.macs, p.macs_sparse).removesuffix(" %") + "%",
            words.change(p.dense.mhsa_macs, p.mhsa_macs_sparse).removesuffix(" %") + "%",
            *(cell[:-1] if name == "agree %" else cell for name, _, cell in quality(s.evaluation)),
            f"{speed.median:.2f}x",
            f"{speed.p10:.2f}-{speed.p90:.2f}",
        )
    flips = one.evaluation.images_lost is not None
    parts: list[RenderableType] = [
        Text("MACs of an image: theoretical. Accuracy and speed: measured", style="italic"),
        shown,
        Text(f"{seen(sweep)}{'; -/+: images lost and gained' if flips else ''}", style="dim"),
        Text(conditions(sweep), style="dim"),
        *(Text(f"left out, {reason}", style="bold") for reason in sweep.skipped.values()),
    ]
    return Group(*parts)
