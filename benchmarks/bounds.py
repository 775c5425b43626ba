"""What the kernels cannot go below: cycles for each (query, key) pair of one head, from counts of the work alone.

One core of the Zen 4 kind: 16 float32 lanes of multiply-add a cycle (one 512-bit instruction, or two of 256 bits); a bf16
dot product does twice as many; 64 bytes a cycle from L1, 32 from L2. Counted are, one stage after the other, as the
kernels work through a block of rows:

    scores      n N r multiply-adds (bf16: r/2 dot products of two)                          FMA
    selection   the bytes that stand for the scores, read by one count and by the emission;
                tiles: written once for each row, read once for each tile                    selection
    attention   n (b + M) + P N pairs of 2 d multiply-adds, or the keys and values that they
                fetch, (b + M) 2 d elements for each key set; the slower of the two          FMA or load bandwidth
    clusters    two assignments of n keys to M cells by r coordinates, float32               FMA

Left out are exponentials, sums across lanes, the other counts of the selection, rounding scores to bytes, writing key lists,
reading and packing q, k and v, the tail's bookkeeping, the coefficients of the paper's predictor, memory past L2, calls and
threads that wait for each other. So the share reached says how much is left at most, not how much could be had.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from sparsify.ops import tails
from sparsify.ops.cpu import build
from sparsify.ops.spec import Spec

LANES = 16  # float32 multiply-adds a cycle
L1_BYTES, L1_RATE, L2_RATE = 32 << 10, 64, 32  # size; bytes a cycle
LLOYD = tails.LLOYD_STEPS

SPIN = """
extern "C" long spin(long n) {
  long x = 1;
  for (long i = 0; i < n; i++) asm volatile(".rept 100\\n\\tadd %0, %0\\n\\t.endr" : "+r"(x));
  return x;
}
"""


class Bound(NamedTuple):
    """A lower bound: cycles for each of the N^2 pairs of a head, and what most of them are spent on."""

    cycles: float
    unit: str


def dense(N: int, d: int, bf16: bool) -> Bound:
    """Of dense attention: 2 d multiply-adds a pair."""
    return Bound(2 * d / LANES / (2 if bf16 else 1), "FMA")


def sparse(spec: Spec, ranks: tuple[int, ...], N: int, d: int, bf16: bool) -> Bound:
    """Of the sparse op, mean over the heads.

    Args:
        spec: constants of the call.
        ranks: r of each head; the kernels score the paper's predictor as a product of that rank too.
        bf16: stored and multiplied as bfloat16.
    """
    n, per_lane = N - spec.prefix, LANES * (2 if bf16 else 1)
    counts = [tails.TAILS[spec.tail].count(spec.grid, cells) for cells in spec.cells]
    M = sum(counts) / len(counts)
    r = sum(ranks) / len(ranks)
    lists = math.prod(-(-side // tile) for side, tile in zip(spec.grid, spec.tile, strict=True)) if spec.tile else n
    attended = sum(spec.budgets) / len(spec.budgets) + M
    size = 2 if bf16 else 4
    in_l1 = min(1, L1_BYTES / (N * 2 * d * size))
    fma = (n * attended + spec.prefix * N) * 2 * d / per_lane
    load = lists * attended * 2 * d * size * (in_l1 / L1_RATE + (1 - in_l1) / L2_RATE)
    units = {
        "FMA": n * N * r / per_lane + (LLOYD * n * M * r / LANES if spec.tail == "clusters" else 0),
        "selection": (2 * lists + (n if spec.tile else 0)) * N / L1_RATE,
        "load bandwidth": 0.0,
    }
    units["FMA" if fma > load else "load bandwidth"] += max(fma, load)
    return Bound(sum(units.values()) / N**2, max(units, key=lambda unit: units[unit]))


def clock_ghz() -> float | None:
    """Cycles a nanosecond of one core, from a chain of additions that takes a cycle each; None without a compiler."""
    compiler = build.find_compiler()
    if not compiler:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "spin.cpp"), Path(folder, "spin.so")
        source.write_text(SPIN, encoding="utf-8")
        command = [*compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        spin = ctypes.CDLL(str(library)).spin
        spin.argtypes = [ctypes.c_long]
        best, steps = float("inf"), 100_000
        for _ in range(20):
            begin = time.perf_counter_ns()
            spin(steps)
            best = min(best, time.perf_counter_ns() - begin)
    return 100 * steps / best
