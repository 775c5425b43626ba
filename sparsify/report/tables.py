"""Results as rich renderables, made to read well at 80 columns, without colour and in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsify import report
from sparsify.profiling import Profile

NOTHING = "–"  # a figure that there is not
Row = tuple[str, str, str, str]  # what, dense, sparse, change


def show(what: RenderableType) -> None:
    """Print to standard output; rich drops colour where there is no terminal or NO_COLOR is set."""
    Console().print(what)


def profile_table(profile: Profile) -> Group:
    """Theoretical MACs with their breakdown; then, where something was measured, time, memory and a plain verdict."""
    parts: list[RenderableType] = [
        Text(f"{report.THEORETICAL} ({_pixels(profile)})", style="italic"),
        _table(theoretical(profile)),
        *(Text(line, style="dim") for line in remarks(profile)),
    ]
    warning = report.uncounted(profile.unsupported)
    if warning:
        parts.append(Text(warning, style="bold red"))
    if profile.measured is not None:
        parts += [
            Text(),
            Text("Measured", style="italic"),
            _table(measured(profile)),
            Text(report.conditions(profile), style="dim"),
            *(Text(line, style="bold") for line in verdict(profile)),
            *(Text(line) for line in auto(profile)),
        ]
    return Group(*parts)


def theoretical(p: Profile) -> list[tuple[str, str, str, str]]:
    """Rows of the theoretical table, the whole model first: what, dense, sparse, change."""
    rows = _alone(p, report.headline)
    if p.stage_macs:
        rows.insert(2, ("choosing tokens", "0", report.human(p.stage_macs), ""))
    if p.paper is not None:
        dense, sparse = p.paper["mhsa_macs_dense"], p.paper["mhsa_macs_sparse"]
        what = "MHSA, authors' accounting"
        if dense is None:
            rows.append((what, NOTHING, report.human(sparse), ""))
        else:
            rows.append((what, report.human(dense), report.human(sparse), report.change(dense, sparse)))
    return rows


def measured(p: Profile) -> list[tuple[str, str, str, str]]:
    """Rows of the measured table: what, dense, sparse, change; empty where nothing was measured."""
    return _alone(p, report.measured)


def verdict(p: Profile) -> list[str]:
    """One plain sentence on speed; none where nothing was measured, or nothing dense."""
    return [report.verdict(p)] if p.measured is not None and p.measured.dense is not None else []


def auto(p: Profile) -> list[str]:
    """`report.auto`, which compares with dense where there is dense."""
    if p.measured is None or p.measured.dense is not None:
        return report.auto(p)
    first, *others = report.auto(_stand_in(p))
    return [first.partition("), ")[0] + ")", *others]


def _alone(p: Profile, rows: Callable[[Profile], list[Row]]) -> list[Row]:
    """Rows of a table; without a dense model their dense column and their change are empty."""
    if p.macs_dense is not None:
        return rows(p)
    return [(what, NOTHING, sparse, "") for what, _, sparse, _ in rows(_stand_in(p))]


def _stand_in(p: Profile) -> Profile:
    """`p` with its sparse figures where the dense ones are missing, to be written and then left out."""
    m = p.measured
    if m is not None:
        m = replace(m, dense=m.auto, peak_memory_dense=m.peak_memory_sparse)
    return replace(
        p, macs_dense=p.macs_sparse, mhsa_macs_dense=p.mhsa_macs_sparse, param_count_dense=p.param_count, measured=m
    )


def remarks(p: Profile) -> list[str]:
    """Lines under the theoretical table: what the sparse MHSA is made of, and the tokens of each block where some leave."""
    own = report.breakdown(p)
    if p.full_macs:
        full = f"dense blocks {report.human(p.full_macs)}"
        own = f"sparse MHSA = {full}" if p.full_macs == p.mhsa_macs_sparse else f"{own} + {full}"
    lines = [own]
    if p.stage_macs or p.tokens[0][0] != p.tokens[-1][1]:
        last, end = p.tokens[-1]
        lines.append(
            f"tokens per block {' '.join(str(before) for before, _ in p.tokens)}"
            + (f", then {end} into the last MLP" if end != last else "")
        )
    if p.paper is not None:
        lines.append(
            "authors' accounting: as Sparsifiner's tables count; not what is executed, nor checked by a second count"
        )
    return lines


def module_tree(profile: Profile, *, full: bool = False) -> Group:
    """MACs by module, dense beside sparse, children indented under their parent.

    Neighbouring blocks with the same figures share one set of rows, unless `full`.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("module", no_wrap=True, overflow="ellipsis", ratio=1)
    for heading in ("params", "dense", "sparse", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, row in tree_rows(profile, full=full):
        dense, sparse = row["macs_dense"], row["macs_sparse"]
        table.add_row(
            Text("  " * row["depth"] + label, style="dim" if dense == sparse else ""),
            report.human(row["params"]),
            report.human(dense) if row["type_dense"] else NOTHING,
            report.human(sparse),
            report.change(dense, sparse) if dense != sparse else "",
        )
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
    """Accuracy of the sparse model beside the dense one.

    Args:
        result: percentages from 0 to 100 under top1, top5, dense_top1, dense_top5, agreement, knn_top1, dense_knn_top1;
            kl in nats; images, images_lost, images_gained, broken as counts; throughput_dense and throughput_sparse in
            images/s; cosine_pooled, cosine_patch, rel_error_pooled, rel_error_patch from 0 to 1. What is missing or
            None is left out, or a dash beside a sparse figure.
    """
    pairs = Table(box=None, pad_edge=False)
    for heading in ("", "dense", "sparse", "change"):
        pairs.add_column(heading, justify="left" if not heading else "right")
    for label, dense_key, key in (
        ("top-1, %", "dense_top1", "top1"),
        ("top-5, %", "dense_top5", "top5"),
        ("k-nearest-neighbour top-1, %", "dense_knn_top1", "knn_top1"),
        ("throughput, images/s", "throughput_dense", "throughput_sparse"),
    ):
        dense, sparse = result.get(dense_key), result.get(key)
        if dense is None and sparse is None:
            continue
        points = dense is not None and sparse is not None
        if key.startswith("throughput"):
            difference = report.change(dense, sparse) if points else ""  # type: ignore[arg-type]
            pairs.add_row(label, _number(dense, None), _number(sparse, None), difference)
        else:
            difference = f"{sparse - dense:+.2f} points" if points else ""  # type: ignore[operator]
            pairs.add_row(label, _number(dense, ".2f"), _number(sparse, ".2f"), difference)
    singles = Table(box=None, pad_edge=False, show_header=False)
    singles.add_column()
    singles.add_column(justify="right")
    for label, key, form in (
        ("images", "images", ",d"),
        ("agreement of predicted classes, %", "agreement", ".2f"),
        ("KL(dense || sparse), nats per image", "kl", ".4f"),
        ("images lost (dense right, sparse wrong)", "images_lost", ",d"),
        ("images gained (dense wrong, sparse right)", "images_gained", ",d"),
        ("cosine similarity, pooled features", "cosine_pooled", ".4f"),
        ("cosine similarity, patch features", "cosine_patch", ".4f"),
        ("relative error, pooled features", "rel_error_pooled", ".4f"),
        ("relative error, patch features", "rel_error_patch", ".4f"),
    ):
        if result.get(key) is not None:
            singles.add_row(label, format(result[key], form))
    parts: list[RenderableType] = [Text("Measured, on the same images", style="italic")]
    parts += [table for table in (pairs, singles) if table.row_count]
    if result.get("broken"):
        parts.append(Text(f"{result['broken']} broken image(s) left out of every figure above", style="bold red"))
    return Group(*parts)


def _table(rows: list[tuple[str, str, str, str]]) -> Table:
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


def _number(value: float | None, form: str | None) -> str:
    if value is None:
        return NOTHING
    return report.plain(value) if form is None else format(value, form)
