"""Converted models beside the strongest dense baseline, in every runtime at hand: `make bench-serving`.

    python benchmarks/serving.py [--threads 2] [--rounds 9] [--only "deit"] [--runtimes eager onnxruntime openvino]

All ways of one table are timed in one interleaved run: dense and converted, eager, under torch.compile, in ONNX Runtime and
OpenVINO, there in int8 too. `x best dense` is the ratio to the best dense way of the same class: float32, or reduced
(bfloat16 and int8). Schedules for a share of the MACs are searched with the sensitivities of DeiT-Tiny's real weights
(SPARSIFY_TEST_DATA) and the costs of the model, by fewer tokens alone, as `convert --for openvino` does. Weights are random:
enough for time, and nothing is said of accuracy. `bar` is what the best converted way should reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from accuracy import DATA, WEIGHTS
from harness import Report, Row, conditions, judged, options, start
from model import converted
from tokens_speed import count, sensitivity
from torch import nn

from sparsify.config import RUNTIMES as TARGETS
from sparsify.config import Tokens
from sparsify.fit.calibrate.calibrate import fit_importance
from sparsify.fit.schedule import choose
from sparsify.jobs.against import profile_against
from sparsify.jobs.runtimes import RUNTIMES, Runtime
from sparsify.measure.against import Against
from sparsify.measure.latency import Budget
from sparsify.measure.macs import image_shape
from sparsify.nn import graft, schedules
from sparsify.processes import Compute


@dataclass(frozen=True)
class Case:
    """A model, its schedule, and the bar of each class."""

    architecture: str
    side: int
    batch: int
    schedule: (
        float | str
    )  # share of the MACs, by tokens alone; tokens: keep 0.1 and token keep 0.7; keep: keep 0.1 alone
    bars: tuple[tuple[str, float], ...]  # by dtype

    @property
    def label(self) -> str:
        what = {"tokens": "keep 0.1, token keep 0.7", "keep": "keep 0.1"}.get(
            str(self.schedule), f"{self.schedule} of MACs"
        )
        return f"{self.architecture}, {self.side} pixels, batch {self.batch}, {what}"


def bars(float32: float, bfloat16: float) -> tuple[tuple[str, float], ...]:
    return (("float32", float32), ("bfloat16", bfloat16))


OVERHEAD = TARGETS["openvino"]["overhead"]
SMALL, DINO = "deit_small_patch16_224", "vit_small_patch14_dinov2"
CASES = (
    Case(SMALL, 224, 1, 0.55, bars(1.35, 1.3)),
    Case(SMALL, 224, 8, 0.55, bars(1.6, 1.6)),
    Case(SMALL, 224, 1, 0.4, bars(1.5, 1.5)),
    Case(SMALL, 224, 8, 0.4, bars(2.1, 2.1)),
    Case(SMALL, 224, 1, "keep", bars(0.98, 0.98)),
    Case(SMALL, 224, 8, "keep", bars(0.98, 0.98)),
    Case(DINO, 518, 1, "keep", bars(1.1, 1.2)),
    Case(DINO, 518, 1, "tokens", bars(1.7, 1.8)),
)


def scheduled(case: Case) -> tuple[nn.Module, float]:
    """The converted model, and its MACs as a share of dense."""
    sparse = converted(case.architecture, case.side)
    noise = torch.randn(2, *image_shape(sparse), generator=torch.Generator().manual_seed(0))
    fit_importance(sparse, lambda: [noise])  # what it says does not change the time
    dense = count(graft.dense_twin(sparse)).total
    config, measured = sensitivity()
    if isinstance(case.schedule, float):
        plans = choose.options_of(sparse, config, (None,))
        alone = replace(measured, options=plans, keeps=measured.keeps[:, :1])
        config = choose.for_macs(sparse, config, alone, case.schedule, dense, OVERHEAD).config
    else:
        config = config.model_copy(update={"tokens": Tokens(keep=0.7) if case.schedule == "tokens" else None})
    model = schedules.applied(sparse, config)
    return model, count(model).total / dense


def rows(found: Against, bar: float | None) -> list[Row]:
    """Each runtime, and the best converted way beside the best dense way."""
    table: list[Row] = []
    for name, pair in found.pairs.items():
        one, best = pair.same_runtime, pair.best_dense
        table.append(
            {
                "runtime": name,
                "dense ms": pair.dense and pair.dense.median,
                "converted ms": pair.converted and pair.converted.median,
                "p10": pair.converted and pair.converted.p10,
                "p90": pair.converted and pair.converted.p90,
                "attention": pair.attention,
                "x same runtime": one and one.ratio,
                "x best dense": best and best.ratio,
                **judged(best.ratio if best else 0.0, bar if name == found.best_converted else None),
            }
        )
    return table


def in_class(runtime: Runtime, dtype: str) -> bool:
    return dtype in runtime.dtypes and not (runtime.int8 and dtype == "float32")


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--only", default="", help="cases whose label contains this")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="classes")
    parser.add_argument("--runtimes", nargs="+", default=["all"], choices=[*RUNTIMES, "all"])
    arguments = parser.parse_args()
    start(arguments)
    if not WEIGHTS.exists():
        raise SystemExit(f"no weights and photographs at {DATA} (set SPARSIFY_TEST_DATA)")
    report = Report("Converted beside the best dense way", conditions(arguments))
    for case in (case for case in CASES if arguments.only in case.label):
        model, share = scheduled(case)
        for dtype in arguments.dtypes:
            compute = Compute(batch_size=case.batch, dtype=dtype)
            names = [n for n in arguments.runtimes if n == "all" or in_class(RUNTIMES[n], dtype)]
            found = profile_against(model, names, compute=compute, budget=Budget(rounds=arguments.rounds), say=print)
            note = "; ".join([f"{share:.3f} of the dense MACs", *found.left_out.values(), *found.notes])
            report.add(f"{case.label}, {dtype}", rows(found, dict(case.bars).get(dtype)), note)
    report.write(arguments.markdown, arguments.json)


if __name__ == "__main__":
    main()
