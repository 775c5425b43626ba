"""Whether `backend=auto` decides well: 40 shapes, its choice against all candidates measured afresh: `make bench-auto`.

    python benchmarks/auto.py [--threads 2] [--rounds 31] [--shapes 40]

Two choosers that remember nothing decide about each shape, one before and one after all candidates were timed in turns, on
the same kind of random tensors. A choice is good when its median is within 5 % of the lowest, or within the spread (up to
the 90th percentile) of the fastest candidate's runs; it is stable when both choosers took the same. `lost` is what the
worse of the two costs over the fastest. About 5 minutes on two cores.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from unittest.mock import patch

import torch
from activations import PREFIX, grid_of
from harness import Report, Row, conditions, options, start, text
from torch import Tensor

from sparsify.config import SparsityConfig
from sparsify.measure.latency import interleaved
from sparsify.nn.predictor import HeadLowrankPredictor, Predictor, TokenLowrankPredictor
from sparsify.ops import candidates, remembered
from sparsify.ops.attention import attention
from sparsify.ops.auto import Chooser
from sparsify.ops.selection import Context
from sparsify.ops.spec import Kind, Shape, Spec, budget
from sparsify.recipe import load_recipe

WITHIN = 1.05
FP32, BF16 = torch.float32, torch.bfloat16


def shape(
    batch: int, heads: int, tokens: int, dtype: torch.dtype, *, d: int = 64, keep: float = 0.1, tail: str = "clusters",
    tile: tuple[int, ...] = (), precision: str = "input", paper: bool = False,
) -> Shape:  # fmt: skip
    """A call as a converted model makes it."""
    threads, config = torch.get_num_threads(), SparsityConfig(keep=keep).with_cells(tokens)
    kind = Kind("head-folded", 16 * heads, 24 if heads > 1 else 16)
    spec = Spec.uniform(budget(keep, tokens), PREFIX, tail, grid_of(tokens), *config.cells_of(0), tile, d**-0.5)
    if paper:
        knobs = load_recipe("paper-calibrated").sparsity
        kind = Kind("token", knobs.rank, knobs.rank, 0, heads, knobs.token_lowrank.coef_topk or 0)  # type: ignore[arg-type]
    return Shape(batch, heads, tokens, d, dtype, "cpu", threads, False, precision, "cpu", kind, spec)


def sweep() -> Iterator[Shape]:
    """40 shapes: where sparse wins, where dense does, and where they are close."""
    for dtype in (FP32, BF16):
        for batch, heads in ((1, 3), (1, 6), (1, 12), (8, 6)):
            for tokens in (197, 577, 1370):
                yield shape(batch, heads, tokens, dtype)  # 24
        for tokens, batch in ((17, 1), (50, 1), (50, 8), (4097, 1)):
            yield shape(batch, 6, tokens, dtype)  # 32
        for keep in (0.25, 0.5):
            yield shape(1, 6, 577, dtype, keep=keep)  # 36
    yield shape(1, 6, 577, FP32, tile=(4, 4))
    yield shape(1, 16, 730, FP32, d=72)
    yield shape(1, 6, 197, FP32, precision="bf16")
    yield shape(1, 6, 197, FP32, paper=True, tail="none")  # 40


def name(s: Shape) -> str:
    extra = [f"keep {s.spec.budgets[0] / s.tokens:.2g}"]
    extra += [f"d {s.head_dim}"] if s.head_dim != 64 else []
    extra += ["tile {}x{}".format(*s.spec.tile)] if s.spec.tile else []
    extra += ["bf16 storage"] if s.precision == "bf16" else []
    extra += ["token-lowrank"] if s.kind.name == "token" else []
    return f"{s.batch}x{s.heads}, N {s.tokens}, {str(s.dtype).removeprefix('torch.')}, {', '.join(extra)}"


def sparse(s: Shape) -> candidates.Sparse:
    """The sparse form of a shape, by an unfitted predictor of its kind."""
    predictor: Predictor = HeadLowrankPredictor(s.head_dim, (s.kind.rank_sum // s.heads,) * s.heads, True)
    if s.kind.name == "token":
        knobs = load_recipe("paper-calibrated").sparsity.token_lowrank.model_dump()
        predictor = TokenLowrankPredictor(s.heads, s.head_dim, s.tokens, PREFIX, s.kind.rank_max, knobs)
        predictor.reset_parameters(torch.Generator().manual_seed(0))
        predictor.requires_grad_(False)

    def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return attention(q, k, v, predictor(q, k, None, None, s.spec), context, s.spec, s.sparse, s.precision)

    return attend


def decide(s: Shape) -> str:
    """What a chooser that knows nothing takes."""
    with patch.object(remembered, "file_of", return_value=None):
        return Chooser().choose(s, sparse(s)).taken


def row(s: Shape, rounds: int) -> Row:
    first = decide(s)
    found = interleaved(candidates.make(s, sparse(s)), rounds=rounds)
    second = decide(s)
    best = min(found, key=lambda path: found[path].median)
    ms = {path: found[path].median if path in found else None for path in ("cpu", "dense-cpu", "sdpa")}
    lost = max(found[path].median for path in (first, second)) / found[best].median
    within = lost <= WITHIN or max(found[path].median for path in (first, second)) <= found[best].p90
    return {
        "shape": name(s), **{f"{path} ms": value for path, value in ms.items()}, "fastest": best, "auto took": first,
        "then": second, "lost, %": 100 * (lost - 1), "good": within, "stable": first == second,
    }  # fmt: skip


def main() -> None:
    parser = options(__doc__, rounds=31)
    parser.add_argument("--shapes", type=int, default=40, help="how many of the 40, evenly spread")
    arguments = parser.parse_args()
    start(arguments)
    shapes = list(sweep())
    shapes = shapes[:: max(1, len(shapes) // arguments.shapes)][: arguments.shapes]
    report = Report("What auto takes", conditions(arguments, shapes=len(shapes)))
    rows = []
    for s in shapes:
        rows.append(row(s, arguments.rounds))
        print(f"  {rows[-1]['shape']}: {rows[-1]['auto took']}, lost {text(rows[-1]['lost, %'])} %", flush=True)
    good, stable = (sum(bool(r[key]) for r in rows) for key in ("good", "stable"))
    median = statistics.median(float(str(r["lost, %"])) for r in rows)
    note = f"{good} of {len(rows)} good, {stable} stable, median loss {median:.1f} %"
    report.add("Choices of two fresh choosers", rows, note)
    report.write(arguments.markdown, arguments.json)


if __name__ == "__main__":
    main()
