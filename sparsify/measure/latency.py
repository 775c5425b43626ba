"""Measured time and memory. Candidates are timed in turns, so that drift of the machine affects all of them alike."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sparsify.errors import UsageError
from sparsify.ops import timing

BUDGET_S = 10.0  # of measuring, all candidates together
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Budget:
    """How long to measure: as `interleaved`."""

    seconds: float = BUDGET_S
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 1:
            raise UsageError(f"repeats {self.rounds}: expected 1 or more")


@dataclass(frozen=True)
class Timing:
    """Times of one candidate (`ops.timing.stopwatch`), in ms per batch: median, 10th and 90th percentile of all `runs`."""

    median: float
    p10: float
    p90: float
    runs: int

    def throughput(self, batch_size: int) -> float:
        """Images per second at the median."""
        return 1000 * batch_size / self.median

    def overlaps(self, other: Timing) -> bool:
        """Whether the spreads, p10 to p90, have times in common."""
        return self.p10 <= other.p90 and other.p10 <= self.p90


class Rounds(TypedDict, total=False):
    """Keywords of `interleaved` and `by_round`."""

    rounds: int | None
    budget_s: float
    warmup: int
    device: torch.device | str
    clock: Callable[[], float]


def interleaved(candidates: Mapping[str, Callable[[], object]], **how: Unpack[Rounds]) -> dict[str, Timing]:
    """Median and spread of every candidate, timed as `by_round` says, whose arguments these are."""
    return {name: summary(ms) for name, ms in by_round(candidates, **how).items()}


def by_round(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int | None = None,
    budget_s: float = BUDGET_S,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every candidate, a call by its name, once in each round, in alternating order (ABC CBA ABC ...): ms by round.

    Args:
        rounds: None: at least `MIN_ROUNDS`, then until `budget_s` seconds have passed.
        warmup: untimed runs of each candidate before the first round.
        device: what the candidates compute on; on a GPU events time them, and short ones run several times in a row.
        clock: seconds.
    """
    names = list(candidates)
    watches = {name: timing.stopwatch(call, device, clock=clock) for name, call in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for _ in range(warmup):
            for name in names:
                watches[name]()
        start, done = clock(), 0
        while done < rounds if rounds else done < MIN_ROUNDS or clock() - start < budget_s:
            for name in names if done % 2 == 0 else reversed(names):
                times[name].append(watches[name]())
            done += 1
    return times


def summary(ms: list[float]) -> Timing:
    """Median and 10th and 90th percentile of run times in ms (linear interpolation)."""
    if len(ms) == 1:
        return Timing(ms[0], ms[0], ms[0], 1)
    tenths = statistics.quantiles(ms, n=10, method="inclusive")
    return Timing(statistics.median(ms), tenths[0], tenths[-1], len(ms))


def peak_memory(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes of the model's own tensors plus the peak of torch's allocator during one forward pass.

    The peak includes the input and all live tensors, also scratch tensors of ops. It excludes memory of libraries that
    bypass the allocator (oneDNN, cuDNN handles) and the allocator's reserve. The definition is the same on every device.
    """
    own = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    fixed = sum(own.values()) + images.nbytes
    with torch.inference_mode():
        model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
            before = torch.cuda.memory_allocated(images.device)
            model(images)
            torch.cuda.synchronize(images.device)
            return fixed + torch.cuda.max_memory_allocated(images.device) - before
        with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            model(images)
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()  # negative: freed
        peak = max(peak, live)
    return fixed + peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the process's stderr, where torch's profiler library writes log lines at any log level."""
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
