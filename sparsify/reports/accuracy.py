"""Accuracy of a sparse model beside the dense one: rows for a table, wherever it is shown, and files of results.

`result` is a mapping: percentages from 0 to 100 under top1, top5, dense_top1, dense_top5, agreement, knn_top1,
dense_knn_top1, recall_at_1, dense_recall_at_1, ..., neighbour_overlap; kl in nats; images, images_lost, images_gained,
broken as counts; throughput_dense and throughput_sparse in images/s; cosine_pooled, cosine_patch, rel_error_pooled,
rel_error_patch from 0 to 1; and of some NAME_error, the standard error. What is missing or None is left out, or a dash
beside a sparse figure.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.files.outputs import write_json, write_text
from sparsify.reports.words import NOTHING, Row, change, mapping, number, plain, publishable

HEADING = "Measured, on the same images"
TIMM_COLUMNS = "model top1 top1_err top5 top5_err param_count img_size crop_pct interpolation".split()
"""Columns of timm's results files."""


PAIRS = (
    ("top-1, %", "top1"),
    ("top-5, %", "top5"),
    ("k-nearest-neighbour top-1, %", "knn_top1"),
    ("recall@1, %", "recall_at_1"),
    ("recall@5, %", "recall_at_5"),
    ("recall@10, %", "recall_at_10"),
)


def pairs(result: Mapping[str, Any]) -> list[Row]:
    """What, dense, sparse, change."""
    rows: list[Row] = []
    for label, key in PAIRS:
        dense, sparse = result.get(f"dense_{key}"), result.get(key)
        if dense is not None or sparse is not None:
            points = "" if dense is None or sparse is None else f"{sparse - dense:+.2f} points"
            error = result.get(f"{key}_error")
            own = number(sparse, ".2f") + ("" if error is None else f" ± {error:.2g}")
            rows.append((label, number(dense, ".2f"), own, points))
    dense, sparse = result.get("throughput_dense"), result.get("throughput_sparse")
    if dense is not None or sparse is not None:
        dense_rate, sparse_rate = (NOTHING if rate is None else plain(rate) for rate in (dense, sparse))
        both = "" if dense is None or sparse is None else change(dense, sparse)
        rows.append(("throughput, images/s", dense_rate, sparse_rate, both))
    return rows


SINGLES = (
    ("images", "images", ",d"),
    ("agreement of predicted classes, %", "agreement", ".2f"),
    ("KL(dense || sparse), nats per image", "kl", ".4f"),
    ("correlation of the output with dense", "correlation", ".4f"),
    ("relative error of the output", "rel_error_output", ".4f"),
    ("images lost (dense right, sparse wrong)", "images_lost", ",d"),
    ("images gained (dense wrong, sparse right)", "images_gained", ",d"),
    ("images that ran twice, %", "ran_twice", ".2f"),
    ("nearest neighbours shared with dense, %", "neighbour_overlap", ".2f"),
    ("cosine similarity, pooled features", "cosine_pooled", ".4f"),
    ("cosine similarity, patch features", "cosine_patch", ".4f"),
    ("relative error, pooled features", "rel_error_pooled", ".4f"),
    ("relative error, patch features", "rel_error_patch", ".4f"),
)


def singles(result: Mapping[str, Any], names: tuple[str, str] = ("dense", "sparse")) -> list[tuple[str, str]]:
    """What, and its figure, with its standard error where that is known; `names`: of what is compared."""
    found = [(label, _figure(result, key, form)) for label, key, form in SINGLES if result.get(key) is not None]
    return [(label.replace("dense", names[0]).replace("sparse", names[1]), figure) for label, figure in found]


def _figure(result: Mapping[str, Any], key: str, form: str) -> str:
    error, drawn_from = result.get(f"{key}_error"), result.get("drawn_from") if key == "images" else None
    text = format(result[key], form)
    if drawn_from is not None:
        return f"{text} of {drawn_from:,d}"
    return text if error is None else f"{text} ± {error:.2g}"


def conditions(result: Mapping[str, Any]) -> str:
    """Conditions of the measurement, as far as the results contain them."""
    c = mapping(result.get("conditions"))
    side, crop, interpolation = result.get("img_size"), result.get("crop_pct"), result.get("interpolation")
    of = f" of {result['drawn_from']:,}" if result.get("drawn_from") else ""
    words = [f"{result['images']:,}{of} images" + (f" of {publishable(str(c['data']))}" if c.get("data") else "")]
    words += [f"{result['broken']} unreadable ones left out"] if result.get("broken") else []
    words += [f"{side}x{side} pixels"] if side else []
    words += [f"crop {crop:g}"] if isinstance(crop, int | float) and crop else []
    words += [str(interpolation)] if interpolation else []
    words += [str(c[name]) for name in ("dtype", "device_name") if c.get(name)]
    words += [f"{name} {c[name]}" for name in ("backend", "torch", "timm") if c.get(name)]
    return ", ".join(words)


def broken(result: Mapping[str, Any]) -> str:
    """A warning if some images could not be read or gave no finite outputs, else ''."""
    notes = [f"{result['broken']} broken image(s) left out of every figure above"] if result.get("broken") else []
    if n := result.get("nonfinite"):
        notes.append(f"{n} image(s) with outputs that are not finite (NaN or infinity): wrong, without agreement")
    return "; ".join(notes)


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
