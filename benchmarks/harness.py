"""What the benchmarks share: options, the circumstances of a run, and tables as Markdown and JSON.

Rows are mappings from heading to value; JSON gets the values, Markdown three digits of them. Nothing here measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import timm
import torch

from sparsify import __version__
from sparsify.files.outputs import write_json, write_text
from sparsify.ops.cpu import kernels
from sparsify.ops.devices import device_name

Row = Mapping[str, object]


def options(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """Options of every benchmark; `rounds`: the default of `--rounds`, None for a benchmark that times nothing."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds (default {rounds})")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables as JSON")
    return parser


def start(arguments: argparse.Namespace) -> None:
    """Sets the threads and loads the kernels; ends with one line where there are none: there is nothing to measure."""
    torch.set_num_threads(arguments.threads)
    if reason := kernels.available():
        raise SystemExit(f"no CPU kernels here: {reason}")


def conditions(arguments: argparse.Namespace, **more: object) -> dict[str, object]:
    """Machine, threads, kernels, versions and rounds of a run."""
    found: dict[str, object] = {
        "machine": device_name(torch.device("cpu")), "threads": arguments.threads, "kernels": kernels.isa(),
        "torch": torch.__version__, "timm": timm.__version__, "sparsify": __version__,
    }  # fmt: skip
    if "rounds" in arguments:
        found["rounds"] = arguments.rounds
    return found | more


def judged(got: float, bar: float | None) -> Row:
    """The bar beside a figure that should be at least as high, and whether it is; both empty where there is none."""
    return {"bar": bar, "reached": None if bar is None else got >= bar}


class Report:
    """Tables, printed as they come and written whole at the end.

    Args:
        title: heading of the Markdown file.
        conditions: see `conditions`.
    """

    def __init__(self, title: str, conditions: Row) -> None:
        self.title, self.conditions = title, dict(conditions)
        self.tables: list[dict[str, object]] = []
        print(", ".join(f"{key} {value}" for key, value in conditions.items()), flush=True)

    def add(self, title: str, rows: list[Row], note: str = "") -> None:
        """A table; all rows have the headings of the first."""
        self.tables.append({"title": title, "note": note, "rows": [dict(row) for row in rows]})
        print(f"\n{markdown(self.tables[-1])}", flush=True)

    def write(self, markdown_file: Path | None, json_file: Path | None) -> None:
        """The files that were asked for; their folders are made."""
        for path in (markdown_file, json_file):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        if json_file is not None:
            write_json(json_file, {"title": self.title, "conditions": self.conditions, "tables": self.tables})
        if markdown_file is not None:
            circumstances = ", ".join(f"{key} {value}" for key, value in self.conditions.items())
            parts = [f"# {self.title}", circumstances, *map(markdown, self.tables)]
            write_text(markdown_file, "\n\n".join(parts) + "\n")


def markdown(table: Mapping[str, object]) -> str:
    """One table of a `Report`."""
    rows: list[Row] = table["rows"]  # type: ignore[assignment]
    headings = list(rows[0])
    lines = [f"| {' | '.join(headings)} |", "|---|" + "---:|" * (len(headings) - 1)]
    lines += [f"| {' | '.join(text(row[heading]) for heading in headings)} |" for row in rows]
    return "\n".join([f"**{table['title']}**", "", *lines, *(["", str(table["note"])] if table["note"] else [])])


def text(value: object) -> str:
    """A value in a table: three digits of a float, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    return str(value)
