"""Whole models with fewer tokens on the CPU, dense beside sparse, in one interleaved run each: `make bench-tokens`.

    python benchmarks/tokens_speed.py [--threads 2] [--rounds 15] [--only deit]

DeiT-S at 224 pixels: schedules for 0.55 and 0.40 of the MACs, searched with the sensitivities of DeiT-Tiny's real weights
(SPARSIFY_TEST_DATA) and the costs of DeiT-S. ViT-S at 518 and 1024 pixels:
token keep 0.7 at blocks 4, 7 and 10, keep 0.1, tail clusters. `merge` and `evit` are ways of removing tokens; `dense
attention` keeps every key of the tokens present. In float32 models `bf16 storage` means kernel precision bf16. Weights are
random: enough for time, and for MACs, and nothing is said of accuracy. `bar` is what the ratio to `dense` should reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from accuracy import DATA, WEIGHTS
from harness import Report, Row, conditions, judged, options, start
from model import converted
from torch import nn
from variants import deit_tiny, variant

from sparsify.config import SparsityConfig, Tokens
from sparsify.fit.calibrate.calibrate import fit_importance
from sparsify.fit.schedule import choose
from sparsify.fit.schedule.sensitivity import Sensitivity
from sparsify.images import datasets
from sparsify.images.trainset import trainset
from sparsify.measure import analytic
from sparsify.measure.latency import interleaved
from sparsify.measure.macs import image_shape, replica
from sparsify.nn import execution, graft, schedules
from sparsify.nn.attention import Execution

FP32, BF16 = torch.float32, torch.bfloat16
PROBE = 64  # photographs of the sensitivities
THREE = Tokens(keep=0.7)


@dataclass(frozen=True)
class Case:
    """A model at an image size, dtype and batch size.

    Attributes:
        bars: of variants, ratios to dense.
        targets: shares of MACs of searched schedules; none: token keep 0.7 at three stages.
    """

    architecture: str
    side: int
    dtype: torch.dtype
    batch: int
    bars: tuple[tuple[str, float], ...]
    targets: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.architecture}, {self.side} pixels, {name}, batch {self.batch}"


SMALL = (("0.55 of MACs", 1.6), ("0.4 of MACs", 2.2))
CASES = (
    *(Case("deit_small_patch16_224", 224, FP32, batch, SMALL, (0.55, 0.4)) for batch in (8, 1)),
    Case("vit_small_patch14_dinov2", 518, FP32, 1, (("merge", 2.2),)),
    Case("vit_small_patch14_dinov2", 518, BF16, 1, (("merge", 2.7),)),
    Case("vit_small_patch16_224", 1024, FP32, 1, (("merge", 3.5),)),
)


@cache
def sensitivity() -> tuple[SparsityConfig, Sensitivity]:
    """Of DeiT-Tiny on photographs, no labels."""
    model = deit_tiny(224, 32)
    config = SparsityConfig(keep=0.1, spread="none")
    transform = datasets.transform(datasets.data_config(model))
    images = trainset(str(DATA / "imagenet-sample" / "train")).calibration(PROBE, 0, transform, 16, 0)
    fit_importance(model, lambda: images)
    return config, choose.sensitivity(model, config, images, choose.options_of(model, config))


def variants(case: Case, sparse: nn.Module) -> dict[str, nn.Module]:
    """Name -> model; the tensors are shared."""
    noise = torch.randn(2, *image_shape(sparse), generator=torch.Generator().manual_seed(0))
    fit_importance(sparse, lambda: [noise.to(case.dtype)])  # what it says does not change the time
    found = {"dense": graft.dense_twin(sparse)}
    if case.targets:
        config, measured = sensitivity()
        measured = replace(measured, options=choose.options_of(sparse, config))  # it has other heads than DeiT-Tiny
        dense = count(found["dense"]).total
        for target in case.targets:
            chosen = choose.for_macs(sparse, config, measured, target, dense).config
            found[f"{target} of MACs"] = schedules.applied(sparse, chosen)
            found[f"{target} of MACs, its tokens, dense attention"] = schedules.applied(
                sparse, chosen.model_copy(update={"keep": "dense"})
            )
    else:
        config = SparsityConfig(keep=0.1, spread="none")
        for way in ("merge", "evit"):
            tokens = THREE.model_copy(update={"way": way})
            found[way] = schedules.applied(sparse, config.model_copy(update={"tokens": tokens}))
            found[f"{way}, dense attention"] = schedules.applied(
                sparse, config.model_copy(update={"tokens": tokens, "keep": "dense"})
            )
        found["all tokens, keep 0.1"] = schedules.applied(sparse, config)
    for name, model in list(found.items()):
        if name == "dense":
            continue
        execution.set_execution(model, Execution("cpu"))
        if case.dtype == FP32 and not case.targets:
            found[f"{name}, bf16 storage"] = variant(model, Execution("cpu", "bf16"))
    return found


def rows(case: Case, rounds: int) -> tuple[list[Row], str]:
    """A table of one case."""
    sparse = replica(converted(case.architecture, case.side), torch.device("cpu"), case.dtype)
    images = torch.randn(case.batch, 3, case.side, case.side, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    models = variants(case, sparse)
    macs = {name: count(model) for name, model in models.items()}
    timings = interleaved({name: partial(model, images) for name, model in models.items()}, rounds=rounds, warmup=1)
    bars, found = dict(case.bars), []
    for name, timing in timings.items():
        ratio = timings["dense"].median / timing.median
        row: Row = {
            "model": name,
            "MACs": macs[name].total / macs["dense"].total,
            "median ms": timing.median,
            "p10": timing.p10,
            "p90": timing.p90,
        }
        bar = bars.get(name.removesuffix(", bf16 storage"))
        found.append({**row, "x dense": ratio, **judged(ratio, bar), "images/s": timing.throughput(case.batch)})
    first = list(macs.values())[1]
    return found, "tokens per block, first sparse row: " + " ".join(str(n) for n, _ in first.tokens)


def count(model: nn.Module) -> analytic.Analytic:
    """Theoretical MACs of one image; on meta tensors, because fvcore would run the reference at 4097 tokens."""
    meta = replica(model, torch.device("meta"))
    images = torch.zeros(1, *image_shape(model), device="meta", dtype=next(model.parameters()).dtype)
    return analytic.count(meta, images)


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--only", default="", help="cases whose label has this in it")
    arguments = parser.parse_args()
    start(arguments)
    wanted = [case for case in CASES if arguments.only in case.label]
    if not WEIGHTS.exists():
        wanted = [case for case in wanted if not case.targets]
        print(f"DeiT-S is left out: no weights for its schedules at {DATA} (set SPARSIFY_TEST_DATA)")
    report = Report("Fewer tokens", conditions(arguments, keep=0.1))
    for case in wanted:
        report.add(case.label, *rows(case, arguments.rounds))
    report.write(arguments.markdown, arguments.json)


if __name__ == "__main__":
    main()
