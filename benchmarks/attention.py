"""One attention op on the CPU: dense by torch, dense by our kernel, sparse, in one interleaved run: `make bench`.

    python benchmarks/attention.py [--threads 2] [--batch 8] [--sizes 197,1370] [--inputs random] [--compile] [--flex]
    python benchmarks/attention.py --by-head [--sizes 197,1370]

q, k and v are strided as `qkv` gives them, every result is [B, N, H*d] as `proj` takes it, and everything in between is
timed: conversion to bfloat16 storage, predictor scores, selection, tail, torch's transposition. A timing is a few passes
over the inputs of three blocks (`activations.py`), divided by the number of calls; all candidates take turns, medians are
compared with the faster of torch's float32 and bfloat16 scaled_dot_product_attention (SDPA). `bar` is what that ratio
should reach: at batch 8 three quarters of it at batch 1.

`bound` counts work (`bounds.py`), at the core clock measured just before, and `share` is how much of the time it explains.

A table of its own has plans by head beside the same for all heads, in one run: means of keys, ranks and cells are equal, so
that the MACs are too. By head should take at most `BY_HEAD` times as long.

The naive masked form (the reference op) and AVX2 (a process of its own, since an instruction set is chosen once) have
runs of their own, each beside SDPA; AVX2's bar is against float32 SDPA.
About 10 minutes on two cores, at batch 8 half an hour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import activations
import bounds
import torch
from accuracy import WEIGHTS
from activations import PREFIX, Activations, grid_of
from bounds import Bound
from harness import Report, Row, conditions, judged, options, start
from torch import Tensor
from torch.nn import Parameter

from sparsify.config import SparsityConfig
from sparsify.measure.latency import interleaved
from sparsify.nn.predictor import HeadLowrankPredictor, Predictor, TokenLowrankPredictor
from sparsify.ops import attention
from sparsify.ops.cpu import kernels
from sparsify.ops.selection import Context
from sparsify.ops.spec import Spec, budget
from sparsify.recipe import load_recipe

TOKENS = (197, 577, 1370, 4097)
SDPA = {torch.float32: "SDPA fp32", torch.bfloat16: "SDPA bf16"}
OWN = {torch.float32: "own dense fp32", torch.bfloat16: "own dense bf16"}
BARS = {
    "token 0.1 bf16": (2.6, 3.6, 3.6, 4.0),
    "token 0.05 bf16": (3.2, 4.5, 5.0, 6.0),
    "token 0.1 fp32": (2.0, 2.8, 3.0, 3.0),
    "tile 0.1": (4.5, 7.5, 9.0, 11.0),
    "dense bf16": (2.0, 2.0, 2.0, 2.0),
    "dense fp32": (1.3, 1.25, 1.25, 1.25),
    "token 0.1 avx2": (None, None, 2.2, None),
}
BY_HEAD = 1.03  # time of a plan by head, at most, in times of the plan with the same means for all heads
UNEVEN = (-3, 3, -2, 2, -1, 1)  # thirds of a spread, of each head
NAIVE_ROUNDS = 5
FLEX_BLOCK = 128


@dataclass(frozen=True)
class Candidate:
    """What is timed: one call for each block, the dtype of its own dense control, its bar's name, its bound."""

    calls: list[Callable[[], object]]
    dtype: torch.dtype
    bar: str = ""
    bound: Bound | None = None


def heads(block: Activations, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, d] of a block, views of one tensor."""
    q, k, v = block.qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def dense(blocks: list[Activations], path: str, dtype: torch.dtype, bar: str = "") -> Candidate:
    calls, bound = [], None
    for block in blocks:
        q, k, v = heads(block, dtype)
        calls.append(partial(attention.dense, path, q, k, v, None, q.shape[-1] ** -0.5, "input"))
    if path == "dense-cpu":
        bound = bounds.dense(*q.shape[2:], in_bf16(dtype, "input"))
    return Candidate(calls, dtype, bar, bound)


def by_predictor(
    predictor: Predictor, spec: Spec, backend: str, precision: str, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Sparse attention as `SparseAttention` computes it, predictor included."""
    return attention.attention(q, k, v, predictor(q, k, None, None, spec), Context(), spec, backend, precision)


def sparse(
    blocks: list[Activations], config: SparsityConfig, dtype: torch.dtype, bar: str = "", backend: str = "cpu",
    precision: str = "input",
) -> Candidate:  # fmt: skip
    """Sparse attention as `SparseAttention` calls it; cells by N where `config` does not name them."""
    calls, bound, total = [], [], 0.0
    for block in blocks:
        q, k, v = heads(block, dtype)
        _, H, N, d = q.shape
        scale, config = d**-0.5, config.with_cells(N)
        tile = config.tile if config.granularity == "tile" else ()
        spec = Spec.uniform(
            budget(config.keep_of(0), N), PREFIX, config.tail, grid_of(N), *config.cells_of(0), tile, scale
        )
        predictor: Predictor = HeadLowrankPredictor(d, block.ranks, True)
        ranks = block.ranks
        if config.predictor == "token-lowrank":
            ranks = (len(block.w_down),) * H
            predictor = TokenLowrankPredictor(H, d, N, PREFIX, ranks[0], config.token_lowrank.model_dump())
            predictor.w_down = Parameter(block.w_down.to(dtype), False)
            predictor.w_up = Parameter(block.w_up.to(dtype), False)
        calls.append(partial(by_predictor, predictor, spec, backend, precision, q, k, v))
        bound.append(bounds.sparse(spec, ranks, N, d, in_bf16(dtype, precision)))
        total += bound[-1].cycles
    mean = Bound(total / len(bound), bound[-1].unit) if backend == "cpu" else None
    return Candidate(calls, dtype, bar, mean)


def spread_out(mean: int, least: int, step: int = 1) -> tuple[int, ...]:
    """One number for each head around `mean`, none below `least`: in thirds of what lies between, multiples of step."""
    return tuple(
        mean + step * (abs(third) * (mean - least) // (3 * step)) * (1 if third > 0 else -1) for third in UNEVEN
    )


def by_head(blocks: list[Activations], dtype: torch.dtype, precision: str = "input") -> dict[str, Candidate]:
    """Keep 0.1 and rank 16: the same for all heads, then keys, ranks, cells and all three of different size by head."""
    config, found = SparsityConfig(keep=0.1), {}
    for what in ("uniform", "keys", "ranks", "cells", "all"):
        calls = []
        for block in blocks:
            q, k, v = heads(block, dtype)
            N, d = q.shape[2:]
            keys, rank, (rows, columns) = budget(0.1, N), 16, config.with_cells(N).cells_of(0)[0]
            spec = Spec.uniform(keys, PREFIX, config.tail, grid_of(N), (rows, columns), (), d**-0.5)
            ranks = (rank,) * len(UNEVEN)
            if what in ("keys", "all"):
                spec = spec._replace(budgets=spread_out(keys, max(1, keys // 4)))
            if what in ("cells", "all"):
                spec = spec._replace(cells=tuple((each, columns) for each in spread_out(rows, 1)))
            if what in ("ranks", "all"):
                ranks = spread_out(rank, 4, 4)
            predictor = HeadLowrankPredictor(d, ranks, True)
            calls.append(partial(by_predictor, predictor, spec, "cpu", precision, q, k, v))
        found[what] = Candidate(calls, dtype)
    return found


def by_head_rows(blocks: list[Activations], rounds: int) -> list[Row]:
    """Times of plans by head beside the same for all heads, all in one run."""
    bf16, found = torch.bfloat16, {}
    for name, dtype, precision in (
        ("fp32", torch.float32, "input"), ("fp32 inputs, bf16 storage", torch.float32, "bf16"), ("bf16", bf16, "input")
    ):  # fmt: skip
        found |= {(name, what): each for what, each in by_head(blocks, dtype, precision).items()}
    B, N = blocks[0].qkv.shape[:2]
    passes = max(1, round(1000 / (N * B)))
    timings = interleaved({key: partial(_all, each.calls * passes) for key, each in found.items()}, rounds=rounds)
    table: list[Row] = []
    for (name, what), timing in timings.items():
        uniform, calls = timings[name, "uniform"], passes * len(blocks)
        ratio, control = timing.median / uniform.median, what == "uniform"
        table.append({
            "attention": name, "by head": what, "median ms": timing.median / calls, "p10": timing.p10 / calls,
            "p90": timing.p90 / calls, "x uniform": ratio, "x, p10s": timing.p10 / uniform.p10,
            "bar": None if control else BY_HEAD, "reached": None if control else ratio <= BY_HEAD,
        })  # fmt: skip
    return table


def in_bf16(dtype: torch.dtype, precision: str) -> bool:
    """Whether the kernels multiply in bfloat16 here."""
    return (dtype == torch.bfloat16 or precision == "bf16") and kernels.isa() == "avx512bf16"


def sdpa(blocks: list[Activations]) -> dict[str, Candidate]:
    return {label: dense(blocks, "sdpa", dtype) for dtype, label in SDPA.items()}


def main_run(blocks: list[Activations]) -> dict[str, Candidate]:
    """The candidates of the table with the bars."""
    fp32, bf16 = torch.float32, torch.bfloat16
    keep, low = SparsityConfig(keep=0.1), SparsityConfig(keep=0.05)
    paper = load_recipe("paper-calibrated").sparsity
    found = sdpa(blocks)
    found[OWN[fp32]] = dense(blocks, "dense-cpu", fp32, "dense fp32")
    found[OWN[bf16]] = dense(blocks, "dense-cpu", bf16, "dense bf16")
    found["token, keep 0.1, fp32"] = sparse(blocks, keep, fp32, "token 0.1 fp32")
    found["token, keep 0.1, fp32 inputs, bf16 storage"] = sparse(blocks, keep, fp32, precision="bf16")
    found["token, keep 0.1, bf16"] = sparse(blocks, keep, bf16, "token 0.1 bf16")
    for tail in ("cells", "mean", "clusters"):
        config = low.model_copy(update={"tail": tail, "cells": (4, 4) if tail == "cells" else None})
        label = f"token, keep 0.05, {tail}{' 4x4' if tail == 'cells' else ''}, bf16"
        found[label] = sparse(blocks, config, bf16, "" if tail == "clusters" else "token 0.05 bf16")
    for tile in ((4, 4), (4, 8)):
        config = keep.model_copy(update={"granularity": "tile", "tile": tile})
        for dtype, name in ((bf16, "bf16"), (fp32, "fp32")):
            found[f"tile {tile[0]}x{tile[1]}, keep 0.1, {name}"] = sparse(blocks, config, dtype, "tile 0.1")
    found["token-lowrank (paper), keep 0.1, fp32"] = sparse(blocks, paper, fp32)
    found["token-lowrank (paper), keep 0.1, bf16"] = sparse(blocks, paper, bf16)
    return found


def naive_run(blocks: list[Activations]) -> dict[str, Candidate]:
    keep = SparsityConfig(keep=0.1)
    return {**sdpa(blocks), "naive masked form, keep 0.1, fp32": sparse(blocks, keep, torch.float32, "", "reference")}


def isa_run(blocks: list[Activations], isa: str) -> dict[str, Candidate]:
    fp32, keep = torch.float32, SparsityConfig(keep=0.1)
    tile = keep.model_copy(update={"granularity": "tile"})
    return {
        **sdpa(blocks),
        f"own dense fp32, {isa}": dense(blocks, "dense-cpu", fp32),
        f"token, keep 0.1, fp32, {isa}": sparse(blocks, keep, fp32, f"token 0.1 {isa}"),
        f"tile 4x4, keep 0.1, fp32, {isa}": sparse(blocks, tile, fp32),
    }


def compiled(blocks: list[Activations]) -> dict[str, Candidate]:
    """torch.compile of SDPA with the transposition."""
    found = {}
    for dtype, label in SDPA.items():
        call = torch.compile(partial(attention.dense, "sdpa"), dynamic=False)
        arguments = [(*heads(block, dtype), None, block.qkv.shape[-1] ** -0.5, "input") for block in blocks]
        found[f"{label}, torch.compile"] = Candidate([partial(call, *each) for each in arguments], dtype)
    return found


def flex(blocks: list[Activations]) -> dict[str, Candidate]:
    """FlexAttention over a random tenth of the blocks of 128 x 128; neither predictor nor the mask's making is timed."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    call, found = torch.compile(flex_attention, dynamic=False), []
    for block in blocks:
        q, k, v = heads(block, torch.float32)
        B, H, N, _ = q.shape
        side = -(-N // FLEX_BLOCK)
        kept = budget(0.1, side)
        index = torch.rand(B, H, side, side).argsort(-1).to(torch.int32)
        count = torch.full((B, H, side), kept, dtype=torch.int32)
        mask = BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=FLEX_BLOCK, seq_lengths=(N, N))
        found.append(partial(_flex, call, q, k, v, mask))
    return {f"FlexAttention, {kept} of {side} blocks, no predictor, fp32": Candidate(found, torch.float32)}


def _flex(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
    return call(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)


def optional(name: str, make: Callable[[list[Activations]], dict[str, Candidate]], blocks: list[Activations]) -> dict:
    """Candidates that need a compiler and luck; none, and a line, where they fail."""
    try:
        found = make(blocks)
        with torch.inference_mode():
            for candidate in found.values():
                for call in candidate.calls:
                    call()
    except Exception as error:  # whatever torch.compile raises
        print(f"{name} is left out: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
        return {}
    return found


def rows(
    candidates: dict[str, Candidate], blocks: list[Activations], rounds: int, ghz: float | None, threads: int
) -> list[Row]:
    """Times all candidates and compares."""
    B, N, _, H, _ = blocks[0].qkv.shape
    passes = max(1, round(1000 / (N * B)))
    timings = interleaved(
        {name: partial(_all, each.calls * passes) for name, each in candidates.items()}, rounds=rounds
    )
    ms = {name: timing.median / (passes * len(blocks)) for name, timing in timings.items()}
    fastest = min(ms[label] for label in SDPA.values())
    found: list[Row] = []
    for name, candidate in candidates.items():
        yard = ms["SDPA fp32"] if candidate.bar.endswith("avx2") else fastest
        control = next((ms[each] for each in ms if each.startswith(OWN[candidate.dtype])), None)
        spread = {key: getattr(timings[name], key) / (passes * len(blocks)) for key in ("p10", "p90")}
        row: dict[str, object] = {"attention": name, "median ms": ms[name], **spread, "x SDPA": yard / ms[name]}
        row |= judged(yard / ms[name], bar(candidate.bar, N, B))
        row["x own dense"] = control / ms[name] if control else None
        cycles = ms[name] * 1e6 * ghz * threads / (B * H * N * N) if ghz else None
        bound = candidate.bound
        row |= {"cycles a pair": cycles, "bound": bound and bound.cycles, "bound by": bound and bound.unit}
        found.append(row | {"share, %": 100 * bound.cycles / cycles if bound and cycles else None})
    return found


def _all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def bar(name: str, N: int, batch: int) -> float | None:
    """What the ratio should reach; None where nothing was promised."""
    value = dict(zip(TOKENS, BARS[name], strict=True)).get(N) if name in BARS else None
    return value if value is None or batch == 1 else 0.75 * value if batch == 8 else None


def other_isa(isa: str, arguments: list[str], saved: Path, report: Report) -> None:
    """The same benchmark in a process that uses another instruction set; its tables come into the report."""
    result = saved.with_name(f"{isa}.json")
    command = [sys.executable, __file__, *arguments, "--inputs", str(saved), "--isa", isa, "--json", str(result)]
    if subprocess.run(command).returncode:
        print(f"{isa} is left out: its process failed", flush=True)
        return
    report.tables += json.loads(result.read_text(encoding="utf-8"))["tables"]


def main() -> None:
    parser = options(__doc__, rounds=21)
    parser.add_argument("--sizes", default=",".join(map(str, TOKENS)), help="tokens, one more than a square each")
    parser.add_argument("--batch", type=int, default=1, help="images of 6 heads (default 1)")
    parser.add_argument("--inputs", help="photographs (default, where they are), random, or a file of saved ones")
    parser.add_argument("--isa", help="only the float32 kernels with this instruction set: avx2, avx512")
    parser.add_argument("--no-avx2", action="store_true", help="without the run of AVX2")
    parser.add_argument("--no-naive", action="store_true", help="without the naive masked form")
    parser.add_argument("--compile", action="store_true", help="with torch.compile of SDPA")
    parser.add_argument("--by-head", action="store_true", help="only plans by head beside the same for all heads")
    parser.add_argument("--flex", action="store_true", help="with FlexAttention (compiles for a minute)")
    parser.add_argument("--ghz", type=float, help="core clock; measured where not given")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.isa:
        os.environ["SPARSIFY_ISA"] = arguments.isa
    start(arguments)
    inputs = arguments.inputs or ("photographs" if WEIGHTS.exists() else "random")
    given = activations.get(inputs, sizes, arguments.batch)
    words = inputs if inputs in ("photographs", "random") else "saved"
    report = Report("Attention", conditions(arguments, batch=arguments.batch, heads=activations.HEADS, inputs=words))
    for tokens in sizes:
        blocks, where = given[tokens], f"{arguments.batch}x{activations.HEADS} heads, N = {tokens}"
        ghz = arguments.ghz or bounds.clock_ghz()
        note = f"core clock {ghz:.2f} GHz" if ghz else ""
        if not arguments.isa:
            report.add(f"{where}, plans by head", by_head_rows(blocks, arguments.rounds), note)
        if arguments.by_head:
            continue
        time = partial(rows, blocks=blocks, ghz=ghz, threads=arguments.threads)
        if arguments.isa:
            report.add(f"{where}, {kernels.isa()}", time(isa_run(blocks, kernels.isa()), rounds=arguments.rounds), note)
            continue
        candidates = main_run(blocks)
        if arguments.compile:
            candidates |= optional("torch.compile", compiled, blocks)
        if arguments.flex:
            candidates |= optional("FlexAttention", flex, blocks)
        report.add(where, time(candidates, rounds=arguments.rounds), note)
        if not arguments.no_naive:
            rounds = min(NAIVE_ROUNDS, arguments.rounds)
            report.add(f"{where}, naive, {rounds} rounds", time(naive_run(blocks), rounds=rounds), note)
    if not arguments.by_head and not arguments.isa and not arguments.no_avx2 and kernels.isa() != "avx2":
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "inputs.pt"
            activations.save(given, saved)
            same = ("sizes", "batch", "threads", "rounds")
            flags = [f"--{name}={getattr(arguments, name)}" for name in same]
            flags += [f"--ghz={arguments.ghz}"] if arguments.ghz else []
            other_isa("avx2", flags, saved, report)
    report.write(arguments.markdown, arguments.json)


if __name__ == "__main__":
    main()
