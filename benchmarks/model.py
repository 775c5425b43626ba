"""Whole models on the CPU, dense beside sparse, in one interleaved run each: `make bench`.

    python benchmarks/model.py [--threads 2] [--rounds 15] [--only deit] [--list]

All of one run's models share their weights. `dense` is timm's with torch's attention (SDPA), `own dense` the same with our
dense kernel: a control, which tells what sparsity gains from what engineering gains. `token` and `tile` compute the sparse
form at keep 0.1 with the default predictor, rank and tail; `auto` is what `sparsify.load` runs. In float32 models `bf16
storage` means kernel precision bf16. `bar` is what the ratio to `dense` should reach.

DeiT-Tiny has its real weights, where they are (SPARSIFY_TEST_DATA). The others have random weights and a cheap conversion
(four built-in pictures, rank 16 in every head): that is enough for time, and says nothing of accuracy.
About 15 minutes on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import timm
import torch
from accuracy import DATA, WEIGHTS
from harness import Report, Row, conditions, judged, options, start
from torch import nn
from variants import deit_tiny, variant

from sparsify.config import SparsityConfig
from sparsify.fit.calibrate import calibrate
from sparsify.images import datasets
from sparsify.images.trainset import builtin_calibration
from sparsify.measure import paths
from sparsify.measure.latency import interleaved
from sparsify.measure.macs import replica
from sparsify.nn import graft, hosts
from sparsify.nn.attention import Execution
from sparsify.ops.auto import Choice, Chooser
from sparsify.ops.spec import Shape

PICTURES = 4
CALIB_IMAGES = 32  # photographs, real weights
TILE = (4, 4)
REAL = "deit_tiny"


@dataclass(frozen=True)
class Case:
    """A model at an image size, dtype and batch size; `bars`: of variants, ratios to dense."""

    architecture: str
    side: int
    dtype: torch.dtype
    batch: int = 1
    bars: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        weights = "real weights" if self.architecture == REAL else "random weights"
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.architecture}, {self.side} pixels, {name}, batch {self.batch}, {weights}"


FP32, BF16 = torch.float32, torch.bfloat16
NEVER_SLOWER = (("token", 1.0), ("tile", 1.0), ("auto", 1.0))
CASES = (
    Case("vit_small_patch14_dinov2", 518, BF16, 1, (("token", 1.7), ("tile", 2.0))),
    Case("vit_small_patch14_dinov2", 518, FP32, 1, (("token", 1.4), ("tile", 1.6))),
    Case("vit_small_patch16_224", 1024, FP32, 1, (("token", 1.6), ("tile", 2.4))),
    *(Case("deit_small_patch16_224", 224, dtype, batch, NEVER_SLOWER) for dtype in (FP32, BF16) for batch in (1, 8)),
    *(Case(REAL, side, dtype, 1, (("auto", 1.0),)) for side in (224, 384, 512) for dtype in (FP32, BF16)),
)


class Forced:
    """Stands in for `Chooser`: always the same path."""

    def __init__(self, path: str) -> None:
        self.choice = Choice(path, {path: 1.0}, 0, "forced")

    withdrawn = False  # what a training run would set

    def choose(self, shape: Shape, sparse: object) -> Choice:
        return self.choice


@cache
def converted(architecture: str, side: int) -> nn.Module:
    """A sparse model in float32."""
    if architecture == REAL:
        return deit_tiny(side, CALIB_IMAGES)
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, img_size=side).eval()
    pictures = builtin_calibration(False, PICTURES, 0, datasets.transform(datasets.data_config(model)), batch_size=1)
    return calibrate.calibrate(model, SparsityConfig(keep=0.1, spread="none"), lambda: pictures).model.eval()


def variants(sparse: nn.Module) -> dict[str, nn.Module]:
    """Name -> model; the tensors are shared."""

    def kernels(precision: str, suffix: str) -> dict[str, nn.Module]:
        own = Execution("auto", precision, True, Forced("dense-cpu"))  # type: ignore[arg-type]
        found = {"own dense": variant(sparse, own), "token": variant(sparse, Execution("cpu", precision))}
        found["tile"] = variant(sparse, Execution("cpu", precision), TILE)
        return {name + suffix: model for name, model in found.items()}

    found = {"dense": graft.dense_twin(sparse), **kernels("input", "")}
    found["auto"] = variant(sparse, Execution("auto", "input", True, Chooser()))
    if next(sparse.parameters()).dtype == FP32:
        found |= kernels("bf16", ", bf16 storage")
    return found


def rows(case: Case, rounds: int) -> tuple[list[Row], str]:
    """A table of one case, and what `auto` took."""
    sparse = replica(converted(case.architecture, case.side), torch.device("cpu"), case.dtype)
    images = torch.randn(case.batch, 3, case.side, case.side, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    models = variants(sparse)
    took = {}
    for entry in paths.taken(models["auto"], images):
        took[entry["taken"]] = took.get(entry["taken"], 0) + len(entry["blocks"])
    timings = interleaved({name: partial(model, images) for name, model in models.items()}, rounds=rounds, warmup=1)
    bars, found = dict(case.bars), []
    for name, timing in timings.items():
        ratio = timings["dense"].median / timing.median
        row: Row = {"model": name, "median ms": timing.median, "p10": timing.p10, "p90": timing.p90, "x dense": ratio}
        found.append({**row, **judged(ratio, bars.get(name)), "images/s": timing.throughput(case.batch)})
    blocks = ", ".join(f"{path} in {count}" for path, count in took.items())
    return found, f"auto took {blocks} of {sum(took.values())} blocks; N = {hosts.num_tokens(sparse)}"


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--only", default="", help="cases whose label has this in it")
    parser.add_argument("--list", action="store_true", help="print the labels")
    arguments = parser.parse_args()
    wanted = [case for case in CASES if arguments.only in case.label]
    if arguments.list:
        raise SystemExit("\n".join(case.label for case in wanted))
    start(arguments)
    if not WEIGHTS.exists():
        wanted = [case for case in wanted if case.architecture != REAL]
        print(f"DeiT-Tiny is left out: no weights at {DATA} (set SPARSIFY_TEST_DATA)")
    report = Report("Whole models", conditions(arguments, keep=0.1, tile=f"{TILE[0]}x{TILE[1]}"))
    for case in wanted:
        report.add(case.label, *rows(case, arguments.rounds))
    report.write(arguments.markdown, arguments.json)


if __name__ == "__main__":
    main()
