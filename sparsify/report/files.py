"""Results as files: Markdown for people, JSON for programs; written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import BadFile, one_line
from sparsify.files import whole
from sparsify.measure.profile import Profile
from sparsify.report import profile as report

TIMM_COLUMNS = (
    "model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation",
)  # fmt: skip
"""Columns of timm's results files."""


def read_json(path: Path) -> dict[str, Any]:
    """The object of JSON in a file that a command wrote.

    Raises:
        BadFile: missing, or something else.
    """
    if not path.exists():
        raise BadFile(f"no file {path}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read as JSON: {one_line(error, 100)}") from None
    if not isinstance(tree, dict):
        raise BadFile(f"{path} holds no results: an object of JSON is expected")
    return tree


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


def write_json(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write a report as JSON, exact numbers; see `write_text`."""
    write_text(path, json.dumps(tree, indent=2) + "\n")


def write_results(path: str | Path, result: Mapping[str, Any], conditions: Mapping[str, Any] | None = None) -> None:
    """Write results of `eval` as one CSV row, or as JSON, by the ending of `path`: timm's columns first.

    As timm has them, top1_err and top5_err are added (100 - top1) and param_count is in millions. What was not measured
    (None) is an empty cell in CSV and null in JSON. `conditions` go into JSON only.
    """
    row: dict[str, Any] = {**dict.fromkeys(TIMM_COLUMNS), **result}
    if row["param_count"] is not None:
        row["param_count"] = round(row["param_count"] / 1e6, 2)
    for name in ("top1", "top5"):
        row[f"{name}_err"] = None if row[name] is None else 100 - row[name]
    if Path(path).suffix == ".json":
        write_json(path, row if conditions is None else {**row, "conditions": dict(conditions)})
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), lineterminator="\n")
    writer.writeheader()
    writer.writerow(row)
    write_text(path, text.getvalue())


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all; see `sparsify.files.whole`."""
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def markdown_table(headings: tuple[str, ...], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table; all but the first `left` columns are aligned to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(headings))]
    return [f"| {' | '.join(cells)} |" for cells in (headings, tuple(rule), *rows)]
