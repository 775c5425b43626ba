"""Whole models under torch.compile, sparse beside dense, and both without it: `make bench-compiled`.

    python benchmarks/compiled.py [--architecture deit_small_patch16_224] [--batch 1] [--keep 0.1] [--token-keep 0.7]

Random weights (time does not see them), calibrated on built-in pictures; float32. Inductor compiles each model once, which
takes minutes and is not in the figures. All variants run in turns.
"""

from __future__ import annotations

from functools import partial

import timm
import torch
from harness import Report, Row, conditions, options, start

from sparsify.config import SparsityConfig, Tokens
from sparsify.fit.calibrate import calibrate
from sparsify.images import datasets
from sparsify.images.trainset import builtin_calibration
from sparsify.measure.latency import interleaved
from sparsify.nn import execution, graft
from sparsify.nn.attention import Execution

PICTURES = 4  # that calibration sees


def main() -> None:
    parser = options(__doc__, rounds=31)
    parser.add_argument("--architecture", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=1, help="images of a call")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--token-keep", type=float, help="with fewer tokens, merged at three blocks (4, 7, 10 of 12)")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    arguments = parser.parse_args()
    start(arguments)
    torch.manual_seed(0)
    model = timm.create_model(arguments.architecture, pretrained=False).eval()
    pictures = builtin_calibration(False, PICTURES, 0, datasets.transform(datasets.data_config(model)), batch_size=2)
    tokens = None if arguments.token_keep is None else Tokens(keep=arguments.token_keep)
    config = SparsityConfig(keep=arguments.keep, spread="none", tokens=tokens)
    sparse = calibrate.calibrate(model, config, lambda: pictures).model.eval().requires_grad_(False)
    execution.set_execution(sparse, Execution("cpu"))
    dense = graft.dense_twin(sparse)
    images = torch.randn(arguments.batch, *datasets.data_config(dense)["input_size"])
    models = {"dense": dense, "sparse": sparse}
    compile = partial(torch.compile, fullgraph=True, backend=arguments.compiler)
    models |= {f"{name}, compiled": compile(model) for name, model in models.items()}
    calls = {name: partial(model, images) for name, model in models.items()}
    report = Report("Compiled models", conditions(arguments, keep=arguments.keep, token_keep=arguments.token_keep))
    with torch.inference_mode():
        for name in ("dense", "sparse"):
            torch.testing.assert_close(calls[f"{name}, compiled"](), calls[name](), atol=1e-3, rtol=1e-3)
    timings = interleaved(calls, rounds=arguments.rounds, warmup=3)
    rows: list[Row] = []
    for name, t in timings.items():
        ratios = {f"x {other}": timings[other].median / t.median for other in ("dense", "dense, compiled")}
        rows.append({"model": name, "median ms": t.median, "p10": t.p10, "p90": t.p90, **ratios})
    report.add(f"{arguments.architecture}, batch {arguments.batch}, float32", rows)
    report.write(arguments.markdown, arguments.json)


if __name__ == "__main__":
    main()
