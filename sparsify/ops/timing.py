"""Milliseconds of calls: by a clock on a CPU; on a GPU by events, eager or replayed from a CUDA graph.

A GPU works while Python already prepares the next call, so one synchronised call measures Python. Here several calls run
in a row between two events, long enough that starting and waiting do not count. Eager calls that Python issues more slowly
than the GPU computes them take Python's time, as they do in a model that runs eagerly; replays of a graph do not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

LEAST_MS = 3.0  # of one reading on a GPU, if `MOST_CALLS` suffice; events resolve 0.5 us
MOST_CALLS = 200
GRAPHED = 20  # calls of one op in a graph: a replay takes about 10 us to start
WARM_UP = 3  # calls before a capture, as torch advises

Stopwatch = Callable[[], float]
"""Runs a call, on a GPU several times in a row. Returns ms of one run."""


def stopwatch(
    call: Callable[[], object],
    device: torch.device | str = "cpu",
    graph: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Stopwatch:
    """What times `call`, which computes on `device`.

    Args:
        graph: on CUDA, time replays of a graph of so many calls, which is captured here; 0: eager. The call may not wait for
            the device.
        clock: seconds; not used for CUDA.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _events(captured(call, graph, device), device, graph) if graph else _events(call, device)

    def by_clock() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        begin = clock()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return 1000 * (clock() - begin)

    return by_clock


def captured(call: Callable[[], object], calls: int, device: torch.device) -> Callable[[], None]:
    """Replays a CUDA graph of that many calls in a row."""
    with torch.cuda.device(device):
        warm_up(call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    return graph.replay


def warm_up(call: Callable[[], object]) -> None:
    """Runs a call on a stream of its own, as a capture needs: libraries allocate what they keep, kernels are compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)


def _events(run: Callable[[], object], device: torch.device, calls: int = 1) -> Stopwatch:
    """Times `run`, which makes that many calls, so often in a row that a reading takes `LEAST_MS`."""
    runs = 1

    def read() -> float:
        nonlocal runs
        with torch.cuda.device(device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(runs):
                run()
            last.record()
            last.synchronize()
            ms = first.elapsed_time(last) / runs
        runs = max(1, min(math.ceil(LEAST_MS / max(ms, 1e-6)), MOST_CALLS // calls))
        return ms / calls

    return read
