"""MHSA MACs against agreement and KL over rank, tail and keep: writes docs/frontier.md and docs/frontier.png.

    python benchmarks/frontier.py [--images 200] [--calib-images 64]

DeiT-Tiny's real weights. Calibration and measurement both use photographs of `imagenet-sample/train`, different ones.
Rank and tail were chosen here; the rule for M away from keep 0.1, and ranks by head, after looking at the 950 photographs
of `accuracy.py` too. MACs are theoretical; the shares are those of every model with N = 197 and d = 64. About 25 minutes
on two cores.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor

from sparsify.config import SparsityConfig
from sparsify.fit.calibrate import calibrate
from sparsify.images import datasets
from sparsify.images.trainset import trainset
from sparsify.measure.evaluate import evaluate
from sparsify.measure.profile import profile
from sparsify.models import dense_weights

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SPARSIFY_TEST_DATA", ROOT.parent / "shared" / "data"))
PAPER = {"predictor": "token-lowrank", "rank": 36}


def settings() -> Iterator[tuple[str, dict]]:
    """Series and settings of every point."""
    for keep in (0.05, 0.1, 0.25):
        for tail in ("none", "mean", "cells", "clusters"):
            yield f"{tail}, rank 16", dict(keep=keep, tail=tail)
    for rank in (8, 12, 20, 24):
        yield "clusters, other ranks, keep 0.1", dict(keep=0.1, rank=rank)
    yield "clusters, rank 16, keep 0.1, not spread", dict(keep=0.1, spread="none")
    for cells in ((2, 2), (3, 2), (4, 4), (5, 5)):
        yield "clusters, other cells, rank 16, keep 0.1", dict(keep=0.1, cells=cells)
    for keep, tail in ((0.1, "none"), (0.25, "none"), (0.1, "clusters")):
        yield f"the paper's predictor, {tail}", dict(keep=keep, tail=tail, **PAPER)
    yield "tiles of 4x4 queries, clusters, rank 16", dict(keep=0.1, granularity="tile")


def measure(images: int, calib_images: int, wanted: str) -> list[dict]:
    """One row for each setting of the series that have `wanted` in their name: MHSA share, agreement and KL."""
    dense = timm.create_model("deit_tiny_patch16_224").eval()
    dense.load_state_dict(dense_weights.read_checkpoint(DATA / "deit_tiny_patch16_224.safetensors").state)
    transform = datasets.transform(datasets.data_config(dense))
    drawn = trainset(DATA / "imagenet-sample" / "train").calibration(calib_images + images, 0, transform)
    every = torch.cat(list(drawn))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    calibrate_on, shown = every[order[:calib_images]], every[order[calib_images:]]
    rows = []
    for series, setting in settings():
        if wanted not in series:
            continue
        model = copy.deepcopy(dense)
        calibrate.calibrate(model, SparsityConfig(**setting), lambda: calibrate_on.split(16))
        result = evaluate(model, dense, _unlabelled(shown))
        macs = profile(model, measure=False)
        share = macs.mhsa_macs_sparse / macs.mhsa_macs_dense
        rows.append({"series": series, **setting, "share": share, "agreement": result.agreement, "kl": result.kl})
        print(f"{series:42s} {share:.3f} {result.agreement:5.1f} {result.kl:.4f}", setting, flush=True)
    return rows


def _unlabelled(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return ((x, torch.zeros(len(x), dtype=torch.int64)) for x in images.split(25))


def markdown(rows: list[dict], images: int, calib_images: int, date: str) -> str:
    error = 100 * (0.06 * 0.94 / images) ** 0.5
    lines = [
        "# How the defaults were chosen",
        "",
        "Rank and tail were chosen from this table. Ranks by head, and the number of cells at keep other than 0.1, were",
        "chosen after looking at the photographs of `make bench-accuracy` too. `make frontier` writes this page.",
        "",
        f"- **Measured**: DeiT-Tiny, {calib_images} photographs for calibration, {images} others for measuring, no labels,",
        f"  no training. The standard error of agreement is about {error:.1f} points; KL separates settings better. `MHSA`",
        "  is the fraction of dense attention's multiply-accumulates that remains, predictor and tail included",
        "  (theoretical; the same for every model with N = 197, d = 64).",
        "- **Processor, versions**: not recorded.",
        f"- **Date**: {date}.",
        "- **Command**: `make frontier`",
        "",
        "![frontier](frontier.png)",
        "",
        "| setting | keep | rank | cells | MHSA | agreement, % | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = "x".join(map(str, r["cells"])) if "cells" in r else "by N and keep"
        used = cells if r.get("tail", "clusters") in ("cells", "clusters") else "-"
        figures = f"{r['share']:.3f} | {r['agreement']:.1f} | {r['kl']:.4f}"
        lines.append(f"| {r['series']} | {r['keep']:g} | {r.get('rank', 16)} | {used} | {figures} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    for n, series in enumerate(dict.fromkeys(r["series"] for r in rows)):
        some = sorted((r for r in rows if r["series"] == series), key=lambda r: r["share"])
        style = dict(marker="osD^vPX*<>hp"[n % 12], label=series, linewidth=1, color=f"C{n % 10}")
        left.plot([100 * r["share"] for r in some], [r["agreement"] for r in some], **style)
        right.plot([100 * r["share"] for r in some], [r["kl"] for r in some], **style)
    for axes, label in ((left, "agreement with dense, %"), (right, "KL(dense || sparse), nats")):
        axes.axvline(30, color="0.6", linestyle=":", linewidth=1)
        axes.set_xlabel("MHSA MACs, % of dense (theoretical)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    right.set_yscale("log")
    left.legend(fontsize=7, loc="lower right")
    figure.suptitle("DeiT-Tiny at 224 pixels, calibrated without training")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="photographs to measure on")
    parser.add_argument("--calib-images", type=int, default=64, help="photographs to calibrate on")
    parser.add_argument("--only", default="", help="series whose name has this in it")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the page and its plot")
    arguments = parser.parse_args()
    rows = measure(arguments.images, arguments.calib_images, arguments.only)
    plot(rows, arguments.output / "frontier.png")
    (arguments.output / "frontier.md").write_text(
        markdown(rows, arguments.images, arguments.calib_images, f"{datetime.date.today():%-d %B %Y}"), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
