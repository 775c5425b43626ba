"""How results are shown: `tables` on a terminal, `files` as Markdown and JSON. The words they share are here.

Where a profile has no dense model, a dash stands for each dense figure and each change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsify.measure.figures import Profile
from sparsify.measure.latency import Timing
from sparsify.report import profile as report
from sparsify.report.words import NOTHING, Row, change, human, markdown_table, memory, plain

THEORETICAL = "Theoretical: MACs per image"
PATHS = {
    "cpu": "sparse kernels", "reference": "sparse reference", "dense-cpu": "own dense kernel", "sdpa": "torch's dense SDPA",
}  # fmt: skip
"""Paths of `Profile.choices` in words."""
NOT_SPEED = "Fewer MACs are no promise of speed: the measured part says what this machine makes of them."
NO_DENSE = "No dense figures: the weights are not the dense original's, which was not given (`--dense`)."


def headline(p: Profile) -> list[Row]:
    """Rows of the theoretical table, the whole model first."""
    rows = [
        _row("whole model", p.macs_dense, p.macs_sparse, human),
        _row("MHSA (as executed)", p.mhsa_macs_dense, p.mhsa_macs_sparse, human),
    ]
    if p.stage_macs:
        rows.append(_row("choosing tokens", None if p.macs_dense is None else 0, p.stage_macs, human))
    rows.append(_row("parameters", p.param_count_dense, p.param_count, human))
    if p.paper is not None:
        dense, sparse = p.paper["mhsa_macs_dense"], p.paper["mhsa_macs_sparse"]
        rows.append(_row("MHSA, authors' accounting", dense, sparse, human))
    return rows


def remarks(p: Profile) -> list[str]:
    """Lines under the theoretical table: what the sparse MHSA is made of, and the tokens of each block where some leave."""
    lines = [breakdown(p)]
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


def breakdown(p: Profile) -> str:
    """One line: what the sparse MHSA is made of."""
    full = f"dense blocks {human(p.full_macs)}"
    if p.full_macs and p.full_macs == p.mhsa_macs_sparse:
        return f"sparse MHSA = {full}"
    return (
        f"sparse MHSA = kept pairs {human(p.kept_macs)} + prefix rows {human(p.prefix_macs)}"
        f" + predictor {human(p.predictor_macs)} + tail {human(p.tail_macs)}" + (f" + {full}" if p.full_macs else "")
    )


def module_cells(row: Mapping[str, Any], words: Callable[[float], str]) -> tuple[str, str, str]:
    """MACs of a row of `Profile.modules`, dense and sparse, and their change; a dash: no such module in the dense model."""
    dense, sparse = row["macs_dense"], row["macs_sparse"]
    return (
        words(dense) if row["type_dense"] else NOTHING,
        words(sparse),
        change(dense, sparse) if dense != sparse else "",
    )


def measured(p: Profile) -> list[Row]:
    """Rows of the measured table; empty where nothing was measured."""
    m = p.measured
    if m is None:
        return []
    dense, sparse = m.dense, m.sparse
    median = None if dense is None else dense.median
    rate = None if dense is None else dense.throughput(p.batch_size)
    return [
        _row("latency, ms/batch (median)", median, sparse.median, plain),
        ("  its spread, p10-p90", _spread(dense), _spread(sparse), "" if dense else NOTHING),
        _row("throughput, images/s", rate, sparse.throughput(p.batch_size), plain),
        _row("peak memory", m.peak_memory_dense, m.peak_memory_sparse, memory),
    ]


def verdict(p: Profile) -> str:
    """One plain sentence on speed, from the interleaved runs; '' where nothing was measured.

    Without a dense model, measured or not, the reason that nothing is compared.
    """
    if p.macs_dense is None:
        return NO_DENSE
    if p.measured is None:
        return ""
    if p.measured.dense is None:
        return NO_DENSE
    dense, sparse = p.measured.dense, p.measured.sparse
    ratio = dense.median / sparse.median
    if dense.p10 <= sparse.p90 and sparse.p10 <= dense.p90:
        return f"Sparse and dense are equally fast here, within the spread of the runs (ratio of medians {ratio:.2f})."
    if ratio < 1:
        return f"Sparse is {_times(1 / ratio)} slower than dense here: it saves MACs, not time, on this machine."
    return f"Sparse is {_times(ratio)} faster than dense here."


def auto(p: Profile) -> list[str]:
    """What `backend=auto` runs, its time, and for each path taken the blocks and why; empty where nothing was measured."""
    if p.measured is None:
        return []
    dense, found = p.measured.dense, p.measured.auto
    lines = [f"backend=auto: {plain(found.median)} ms/batch ({_spread(found)})"]
    if dense is not None:
        ratio = dense.median / found.median
        if dense.p10 <= found.p90 and found.p10 <= dense.p90:
            words = f"as fast as dense, within the spread (ratio of medians {ratio:.2f})"
        else:
            words = f"{_times(ratio)} faster than dense" if ratio > 1 else f"{_times(1 / ratio)} slower than dense"
        lines[0] += f", {words}"
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for choice in p.choices:
        groups.setdefault((choice["taken"], "" if choice["ms"] else choice["reason"]), []).append(choice)
    for (taken, reason), choices in groups.items():
        blocks = sorted(b for choice in choices for b in choice["blocks"])
        lines.append(f"auto: {_ranges(blocks)} {PATHS[taken]} ({reason or _mean_ms(taken, choices)})")
    return lines


def _mean_ms(taken: str, choices: list[Mapping[str, Any]]) -> str:
    """'0.31 ms; sparse 0.42, sdpa 0.66': medians of the attention calls, a mean over the blocks."""
    total = sum(len(choice["blocks"]) for choice in choices)
    ms = {path: sum(len(c["blocks"]) * c["ms"][path] for c in choices) / total for path in choices[0]["ms"]}
    others = ", ".join(f"{PATHS[path]} {ms[path]:.3g}" for path in ms if path != taken)
    return f"{ms[taken]:.3g} ms" + (f"; {others}" if others else "")


def _ranges(blocks: list[int]) -> str:
    """[0, 1, 2, 5] -> 'blocks 0-2, 5'."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'block' if len(blocks) == 1 else 'blocks'} {words}"


def conditions(p: Profile) -> str:
    """Where and how it was measured, in one line."""
    c = p.conditions
    height, width = c["img_size"]
    if p.measured is None:
        return f"{height}x{width} pixels"
    threads = "1 thread" if c["threads"] == 1 else f"{c['threads']} threads"
    place = c["device_name"] if c["device"] == "cpu" else f"{c['device_name']} ({c['device']})"
    return (
        f"{place}, {threads}, {c['dtype']}, batch {c['batch_size']}, {height}x{width}, {c['runs']} interleaved runs, "
        f"backend {p.backend}, torch {c['torch']}, timm {c['timm']}"
    )


def uncounted(unsupported: Mapping[str, Any]) -> str:
    """A warning where ops were left out of the MACs; '' where none was."""
    if not unsupported:
        return ""
    found = ", ".join(f"{name} ({times}x)" for name, times in sorted(unsupported.items()))
    return f"NOT COUNTED in the MACs above, and so not checked: {found}. Please report this with the model's name."


def _row(what: str, dense: float | None, sparse: float, words: Callable[[float], str]) -> Row:
    return what, NOTHING if dense is None else words(dense), words(sparse), change(dense, sparse)


def _spread(t: Timing | None) -> str:
    return NOTHING if t is None else f"{plain(t.p10)}-{plain(t.p90)}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 1.1 else f"{100 * (ratio - 1):.0f} %"


def to_markdown(profile: Profile, title: str = "Profile") -> str:
    """The whole profile as GitHub Markdown: headline, breakdown, what was measured, and the module tree in full."""
    height, width = profile.conditions["img_size"]
    lines = [f"# {title}", "", f"## {report.THEORETICAL}", "", f"Image size {height}x{width}.", ""]
    lines += markdown_table(("", "dense", "sparse", "change"), report.headline(profile))
    lines += [part for line in report.remarks(profile) for part in ("", f"{line}.")]
    warning = report.uncounted(profile.unsupported)
    if warning:
        lines += ["", f"**{warning}**"]
    verdict = report.verdict(profile)
    if profile.measured is not None:
        lines += ["", "## Measured", ""]
        lines += markdown_table(("", "dense", "sparse", "change"), report.measured(profile))
        lines += ["", f"{report.conditions(profile)}.", "", f"**{verdict}**", ""]
        lines += [*(f"- {line}" for line in report.auto(profile)), "", report.NOT_SPEED]
    else:
        lines += ["", f"**{verdict}**"] if verdict else []
        lines += ["", "Nothing was measured: fewer MACs are no promise of speed (`sparsify profile` measures)."]
    rows = [
        (
            "&nbsp;" * 2 * row["depth"] + (row["name"].rpartition(".")[2] or "(model)"),
            row["type"],
            f"{row['params']:,}",
            *report.module_cells(row, lambda count: f"{count:,}"),
        )
        for row in profile.modules
    ]
    lines += ["", "## By module (theoretical, MACs per image)", ""]
    lines += markdown_table(("module", "type", "parameters", "dense", "sparse", "change"), rows, left=2)
    return "\n".join(lines) + "\n"


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


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['name'].rpartition('.')[2]} {row['type']}".strip()


def _figures(rows: list[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What makes two blocks alike: everything but their names."""
    root = rows[0]["name"]
    return [(r["name"].removeprefix(root), *(v for k, v in r.items() if k != "name")) for r in rows]
