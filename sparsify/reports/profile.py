"""A profile in words: rows of its tables and lines beside them, which the terminal, Markdown and HTML share.

If a profile has no dense model, a dash stands for each dense figure and each change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from sparsify.measure.figures import Profile
from sparsify.reports import words
from sparsify.reports.words import HEADINGS, NOTHING, Row

THEORETICAL = "Theoretical: MACs per image"
PATHS = {
    "cpu": "sparse kernels",
    "masked": "sparse, masked SDPA",
    "reference": "sparse reference",
    "dense-cpu": "own dense kernel",
    "sdpa": "torch's dense SDPA",
    "sdpa-cudnn": "dense, cuDNN",
    "sdpa-flash": "dense, flash attention",
    "sdpa-efficient": "dense, efficient attention",
}
"""Paths of `Profile.choices` in words."""
NOT_SPEED = "Fewer MACs are no promise of speed: the measured part says what this machine makes of them."
NO_DENSE = "No dense figures: the weights are not the dense original's, which was not given (--dense)."


def to_markdown(profile: Profile, title: str = "Profile") -> str:
    """The whole profile as GitHub Markdown: headline, breakdown, what was measured, and the module tree in full."""
    modules = [
        (
            "\u00a0" * 2 * row["depth"] + (row["name"].rpartition(".")[2] or "(model)"),
            row["type"],
            f"{row['params']:,}",
            *module_cells(row, lambda count: f"{count:,}"),
        )
        for row in profile.modules
    ]
    return words.rendered(
        "profile.md.jinja",
        title=title,
        theoretical=THEORETICAL,
        size=words.rectangle(profile.conditions["img_size"]),
        headings=HEADINGS,
        headline=headline(profile),
        remarks=remarks(profile),
        uncounted=uncounted(profile.unsupported),
        measured=measured(profile),
        conditions=conditions(profile),
        verdict=verdict(profile),
        auto=auto(profile),
        not_speed=NOT_SPEED,
        modules=modules,
    )


def headline(p: Profile) -> list[Row]:
    """Rows of the theoretical table, the whole model first."""
    rows = [
        _row("whole model", p.macs_dense, p.macs_sparse, words.human),
        _row("MHSA (as executed)", p.mhsa_macs_dense, p.mhsa_macs_sparse, words.human),
    ]
    if p.stage_macs:
        rows.append(_row("choosing tokens", None if p.macs_dense is None else 0, p.stage_macs, words.human))
    rows.append(_row("parameters", p.param_count_dense, p.param_count, words.human))
    if p.paper is not None:
        figures = p.paper["mhsa_macs_dense"], p.paper["mhsa_macs_sparse"]
        rows.append(_row("MHSA, authors' accounting", *figures, words.human))
    return rows


def remarks(p: Profile) -> list[str]:
    """Lines under the theoretical table: the parts of the sparse MHSA, and the tokens of each block if some are removed."""
    lines = [breakdown(p)]
    if p.stage_macs or p.tokens[0][0] != p.tokens[-1][1]:
        last, end = p.tokens[-1]
        tokens = f"tokens per block {' '.join(str(before) for before, _ in p.tokens)}"
        lines.append(tokens + (f", then {end} into the last MLP" if end != last else ""))
    if p.paper is not None:
        lines.append(
            "authors' accounting: as Sparsifiner's tables count; not what is executed, nor checked by a second count"
        )
    return lines


def breakdown(p: Profile) -> str:
    """The parts of the sparse MHSA in one line."""
    full = f"dense blocks {words.human(p.full_macs)}"
    if p.full_macs and p.full_macs == p.mhsa_macs_sparse:
        return f"sparse MHSA = {full}"
    return (
        f"sparse MHSA = kept pairs {words.human(p.kept_macs)} + prefix rows {words.human(p.prefix_macs)}"
        f" + predictor {words.human(p.predictor_macs)} + tail {words.human(p.tail_macs)}"
        + (f" + {full}" if p.full_macs else "")
    )


def uncounted(unsupported: Mapping[str, Any]) -> str:
    """A warning if ops were left out of the MACs, else ''."""
    if not unsupported:
        return ""
    ops = ", ".join(f"{name} ({times}x)" for name, times in sorted(unsupported.items()))
    return f"NOT COUNTED in the MACs above, and so not checked: {ops}. Please report this with the model's name."


def measured(p: Profile) -> list[Row]:
    """Rows of the measured table; empty if nothing was measured."""
    m = p.measured
    if m is None:
        return []
    median = None if m.dense is None else m.dense.median
    rate = None if m.dense is None else m.dense.throughput(p.batch_size)
    return [
        _row("latency, ms/batch (median)", median, m.sparse.median, words.plain),
        ("  its spread, p10-p90", words.spread(m.dense), words.spread(m.sparse), "" if m.dense else NOTHING),
        _row("throughput, images/s", rate, m.sparse.throughput(p.batch_size), words.plain),
        _row("peak memory", m.peak_memory_dense, m.peak_memory_sparse, words.memory),
    ]


def conditions(p: Profile) -> str:
    """Where and how it was measured, in one line."""
    c = p.conditions
    if p.measured is None:
        return f"{words.rectangle(c['img_size'])} pixels"
    return words.timed_on(words.device(c), c, f"{c['runs']} interleaved runs", p.backend)


def verdict(p: Profile) -> str:
    """One plain sentence on speed, from the interleaved runs; '' if nothing was measured.

    Without a dense model, measured or not, the reason why nothing is compared.
    """
    m = p.measured
    if p.macs_dense is None or (m is not None and m.dense is None):
        return NO_DENSE
    if m is None or m.dense is None:
        return ""
    dense, sparse = m.dense, m.sparse
    ratio = dense.median / sparse.median
    if dense.overlaps(sparse):
        return f"Sparse and dense are equally fast here, within the spread of the runs (ratio of medians {ratio:.2f})."
    if ratio < 1:
        return f"Sparse is {_times(1 / ratio)} slower than dense here: it saves MACs, not time, on this machine."
    return f"Sparse is {_times(ratio)} faster than dense here."


def auto(p: Profile) -> list[str]:
    """Time of `backend=auto`, and for each path that it selected the blocks and why; empty if nothing was measured."""
    if p.measured is None:
        return []
    dense, timing = p.measured.dense, p.measured.auto
    lines = [f"backend=auto: {words.plain(timing.median)} ms/batch ({words.spread(timing)})"]
    if dense is not None:
        ratio = dense.median / timing.median
        if dense.overlaps(timing):
            speed = f"as fast as dense, within the spread (ratio of medians {ratio:.2f})"
        else:
            speed = f"{_times(ratio)} faster than dense" if ratio > 1 else f"{_times(1 / ratio)} slower than dense"
        lines[0] += f", {speed}"
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for choice in p.choices:
        groups.setdefault((choice["taken"], "" if choice["ms"] else choice["reason"]), []).append(choice)
    for (path, reason), choices in groups.items():
        blocks = sorted(b for choice in choices for b in choice["blocks"])
        lines.append(f"auto: {_ranges(blocks)} {PATHS[path]} ({reason or _mean_ms(path, choices)})")
    return lines


def _mean_ms(selected: str, choices: list[Mapping[str, Any]]) -> str:
    """'0.31 ms; sparse 0.42, sdpa 0.66': medians of the attention calls, a mean over the blocks."""
    total = sum(len(choice["blocks"]) for choice in choices)
    ms = {path: sum(len(c["blocks"]) * c["ms"][path] for c in choices) / total for path in choices[0]["ms"]}
    others = ", ".join(f"{PATHS[path]} {ms[path]:.3g}" for path in ms if path != selected)
    return f"{ms[selected]:.3g} ms" + (f"; {others}" if others else "")


def _ranges(blocks: list[int]) -> str:
    """[0, 1, 2, 5] -> 'blocks 0-2, 5'."""
    runs = [[block for _, block in run] for _, run in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0])]
    ranges = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'block' if len(blocks) == 1 else 'blocks'} {ranges}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 1.1 else f"{100 * (ratio - 1):.0f} %"


def _row(what: str, dense: float | None, sparse: float, form: Callable[[float], str]) -> Row:
    return what, NOTHING if dense is None else form(dense), form(sparse), words.change(dense, sparse)


def module_cells(row: Mapping[str, Any], form: Callable[[float], str]) -> tuple[str, str, str]:
    """Dense and sparse MACs of a row of `Profile.modules`, and their change; a dash if the dense model has no such one."""
    dense, sparse = row["macs_dense"], row["macs_sparse"]
    change = words.change(dense, sparse) if dense != sparse else ""
    return form(dense) if row["type_dense"] else NOTHING, form(sparse), change


def tree_rows(profile: Profile, *, full: bool = False) -> list[tuple[str, Mapping[str, Any]]]:
    """Label and row of each line of the tree; neighbouring blocks with the same figures share lines unless `full`."""
    subtrees: list[list[Mapping[str, Any]]] = []  # of the children of `blocks`; every other row stands alone
    for row in profile.modules:
        if row["name"].startswith("blocks.") and row["name"].count(".") > 1:
            subtrees[-1].append(row)
        else:
            subtrees.append([row])

    def alike(subtree: list[Mapping[str, Any]]) -> Any:
        name = subtree[0]["name"]
        return _figures(subtree) if name.startswith("blocks.") and not full else name

    lines: list[tuple[str, Mapping[str, Any]]] = []
    for _, group in groupby(subtrees, alike):
        first, *others = group
        for row in first:
            name = row["name"].rpartition(".")[2]
            label = f"{name} {row['type']}".strip()
            if others and row is first[0]:
                last = others[-1][0]["name"].rpartition(".")[2]
                label = f"{name}-{last}: {1 + len(others)} alike, each {row['type']}"
            lines.append((label, row))
    return lines


def _figures(rows: list[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What blocks must share to be alike: everything but their names."""
    root = rows[0]["name"]
    return [(r["name"].removeprefix(root), *(v for k, v in r.items() if k != "name")) for r in rows]
