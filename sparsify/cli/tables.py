"""Results as rich renderables, made to read well at 80 columns, without colour and in a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsify.cli import terminal
from sparsify.measure.adaptive import AdaptiveProfile
from sparsify.measure.against import Against
from sparsify.measure.figures import Profile
from sparsify.measure.sweep import Sweep
from sparsify.reports import accuracy, adaptive, against, header, profile, sweep, words


def show(what: RenderableType) -> None:
    """Print to standard output; in a pipe or a file nothing is wrapped, cut or coloured."""
    terminal.console().print(what)


def profile_table(figures: Profile) -> Group:
    """Theoretical MACs with their breakdown; then, where something was measured, time, memory and a plain verdict."""
    height, width = figures.conditions["img_size"]
    parts: list[RenderableType] = [
        Text(f"{profile.THEORETICAL} ({height}x{width} pixels)", style="italic"),
        _table(profile.headline(figures)),
        *(Text(line, style="dim") for line in profile.remarks(figures)),
    ]
    if warning := profile.uncounted(figures.unsupported):
        parts.append(Text(warning, style="bold red"))
    verdict = Text(profile.verdict(figures), style="bold")
    if figures.measured is not None:
        parts += [
            Text(),
            Text("Measured", style="italic"),
            _table(profile.measured(figures)),
            Text(profile.conditions(figures), style="dim"),
            verdict,
            *(Text(line) for line in profile.auto(figures)),
        ]
    elif verdict:
        parts.append(verdict)
    return Group(*parts)


def budgets_table(about: header.Header) -> Group:
    """The budgets of a file that has several; nothing for another."""
    rows = header.budgets(about)
    table = Table(box=None, pad_edge=False)
    for heading in header.BUDGET_COLUMNS:
        table.add_column(heading, justify="left" if heading == "budget" else "right")
    for row in rows:
        table.add_row(*row)
    return Group(Text(), table) if rows else Group()


def adaptive_table(figures: AdaptiveProfile) -> Group:
    """Costs of adaptive inference in the mean and at worst, beside dense."""
    table = Table(box=None, pad_edge=False)
    for heading in adaptive.COLUMNS:
        table.add_column(heading, justify="right" if heading else "left")
    for row in adaptive.rows(figures):
        table.add_row(*row)
    return Group(table, *(Text(line, style="dim") for line in adaptive.notes(figures)))


def against_table(figures: Against) -> Group:
    """Dense and converted in each runtime, and the verdict."""
    table = Table(box=None, pad_edge=False)
    for heading in against.COLUMNS:
        table.add_column(heading, justify="left" if heading == against.COLUMNS[0] else "right")
    for row in against.rows(figures):
        table.add_row(*row)
    notes = (Text(line, style="dim") for line in against.notes(figures))
    return Group(Text(against.MEASURED, style="italic"), table, *notes, Text(against.verdict(figures), style="bold"))


def module_tree(figures: Profile, *, full: bool = False) -> Group:
    """MACs by module, dense beside sparse, children indented; blocks in a row that are alike share lines unless `full`."""
    table = Table(box=None, pad_edge=False)
    table.add_column("module", no_wrap=True, overflow="ellipsis", ratio=1)
    for heading in ("params", "dense", "sparse", "change"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=7)  # '821.6 k': a long name gives way
    for name, row in profile.tree_rows(figures, full=full):
        same = row["macs_dense"] == row["macs_sparse"]
        cell = Text("  " * row["depth"] + name, style="dim" if same else "")
        table.add_row(cell, words.human(row["params"]), *profile.module_cells(row, words.human))
    return Group(Text(f"{profile.THEORETICAL}, by module", style="italic"), table)


def eval_table(result: Mapping[str, Any], names: tuple[str, str] = ("dense", "sparse")) -> Group:
    """Accuracy of the sparse model beside the dense one; `result`: see `sparsify.reports.accuracy`; `names`: of both."""
    pairs = _table(accuracy.pairs(result), names)
    singles = Table(box=None, pad_edge=False, show_header=False)
    singles.add_column()
    singles.add_column(justify="right")
    for row in accuracy.singles(result, names):
        singles.add_row(*row)
    parts: list[RenderableType] = [Text(accuracy.HEADING, style="italic")]
    parts += [table for table in (pairs, singles) if table.row_count]
    if warning := accuracy.broken(result):
        parts.append(Text(warning, style="bold red"))
    return Group(*parts)


def _table(rows: list[words.Row], names: tuple[str, str] = ("dense", "sparse")) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("", *names, "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        table.add_row(*row)
    return table


def sweep_table(result: Sweep) -> Group:
    """All settings of a sweep beside dense, in 80 columns."""
    one = result.settings[0]
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    quality = sweep.quality(one.evaluation)
    headings = ["", "MACs", "change", "MHSA", *(name for name, _, _ in quality), "speed", "p10-p90"]
    for heading in headings:  # 78 columns where they are full
        short = {"lost/gained": "-/+"}.get(heading, heading.removesuffix(" %"))
        shown.add_column(short, justify="right" if heading else "left", no_wrap=True)
    dense = words.human(one.profile.dense.macs)
    shown.add_row("dense", dense, "", "", *(cell for _, cell, _ in quality), "1.00x", "")
    for s in result.settings:
        p, speed = s.profile, s.speed
        shown.add_row(
            sweep.label(s),
            words.human(p.macs_sparse),
            words.change(p.dense.macs, p.macs_sparse).removesuffix(" %") + "%",
            words.change(p.dense.mhsa_macs, p.mhsa_macs_sparse).removesuffix(" %") + "%",
            *(cell[:-1] if name == "agree %" else cell for name, _, cell in sweep.quality(s.evaluation)),
            f"{speed.median:.2f}x",
            f"{speed.p10:.2f}-{speed.p90:.2f}",
        )
    flips = one.evaluation.images_lost is not None
    parts: list[RenderableType] = [
        Text("MACs of an image: theoretical. Accuracy and speed: measured", style="italic"),
        shown,
        Text(f"{sweep.seen(result)}{'; -/+: images lost and gained' if flips else ''}", style="dim"),
        Text(sweep.conditions(result), style="dim"),
        *(Text(f"left out, {reason}", style="bold") for reason in result.skipped.values()),
    ]
    return Group(*parts)
