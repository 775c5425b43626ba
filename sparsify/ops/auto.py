"""`backend=auto`: the fastest way to compute one attention call on this machine, measured once and remembered.

    cpu         sparse, the kernels of `cpu/`            dense-cpu   dense attention, our own tile kernel
    masked      sparse, one masked attention (GPUs)      sdpa        dense attention by the kernel that torch chooses
    reference   sparse, in PyTorch                       sdpa-*      on GPUs: by cuDNN's, by flash or by efficient attention

Where dense attention may replace the sparse form (`Execution.dense_fallback`), the candidates of a shape run in turns on
random tensors, and the lowest median wins. Among candidates within `MARGIN` of it the first of `PREFERENCE` wins, so that
noise does not change a decision. Decisions are kept in the `Chooser` and on disk (`remembered.py`), but for those that were
made while other work kept the processor busy: these are not written, and made again later.

On GPUs the race reads events (`timing.py`), or times replays of CUDA graphs where the model is replayed.

Calls that are fast by themselves may make a whole model slow, by what they leave in caches. So a model is held against
itself with torch's dense attention in all these calls (`Chooser.settle`), and takes that where it is faster.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsify.ops import attention, candidates, remembered, timing
from sparsify.ops.spec import Shape

DENSE = ("dense-cpu", "sdpa", *attention.SDPA)
PREFERENCE = ("cpu", *DENSE, "masked", "reference")

MARGIN = 1.03  # medians this close count as equal
MIN_ROUNDS = 7
BUDGET_S = 0.3  # for one shape, if MIN_ROUNDS fit into it
LIMIT_S = 2.0  # for one shape whose MIN_ROUNDS do not; FIRST_ROUNDS run in any case
FIRST_ROUNDS = 3
SURE_ROUNDS = 15  # after these, a race ends once the quartiles do not overlap
OWN = 0.9  # of the time of a race, the least that the calling thread computes on a processor that is not busy
AGAIN_S = (20.0, 120.0, 900.0)  # after these a decision of a busy processor is made again, at most so often
SLOWER = 1 / 0.98  # times of a whole model by its decisions and with dense attention: above, dense is taken
HOPELESS = 2.0  # a candidate whose best time is this many times the leader's median drops out


@dataclass(frozen=True)
class Choice:
    """A decision."""

    taken: str  # one of `PREFERENCE`
    ms: Mapping[str, float]  # median time of every candidate
    rounds: int  # of the race
    reason: str  # one line
    busy: bool = False  # the processor did other work meanwhile: the decision will be made again

    @property
    def dense(self) -> str:
        """The fastest of torch's dense kernels."""
        return min((name for name in self.ms if name.startswith("sdpa")), key=self.ms.__getitem__, default="sdpa")


class Race(NamedTuple):
    """What `race` measured."""

    ms: dict[str, float]  # median of each candidate
    rounds: int
    own: float  # fraction of the time in which the calling thread computed


class Chooser:
    """Decides by measuring, once for each shape. One serves any number of modules and threads.

    Args:
        make: `candidates.make`, or another maker of candidates.
        clock: seconds; work: seconds in which the calling thread computed.
    """

    def __init__(
        self,
        make: Callable[[Shape, candidates.Sparse | None], Mapping[str, Callable[[], object]]] = candidates.make,
        clock: Callable[[], float] = time.perf_counter,
        work: Callable[[], float] = time.thread_time,
    ) -> None:
        self._make, self._clock, self._work = make, clock, work
        self._known: dict[Shape, Choice] = {}
        self._until: dict[
            Shape, tuple[float, int]
        ] = {}  # when a decision of a busy processor ends, and how many there were
        self._machines: dict[str, tuple[dict[str, str], Path | None]] = {}
        self._lock = threading.Lock()
        self._withdrawn = False

    @property
    def withdrawn(self) -> bool:
        """Whether dense attention is no longer allowed; see `withdraw`."""
        return self._withdrawn

    def withdraw(self) -> None:
        """Allow no dense attention from now on: weights of the model, or of a copy that shares this, may have changed."""
        self._withdrawn = True

    def choose(self, shape: Shape, sparse: candidates.Sparse | None) -> Choice:
        """The decision of a shape; the first call of a new one measures for about `BUDGET_S` seconds.

        sparse: what computes the sparse form; None: of a dense call, whose `shape.sparse` is ''.
        """
        known = self._known.get(shape)
        return self._decide(shape, sparse) if known is None or (known.busy and self._over(shape)) else known

    def _over(self, shape: Shape) -> bool:
        return self._clock() >= self._until[shape][0]

    def _decide(self, shape: Shape, sparse: candidates.Sparse | None) -> Choice:
        with self._lock:
            known = self._known.get(shape)
            if known is not None and not (known.busy and self._over(shape)):  # another thread was first
                return known
            machine, path = self._machine(shape.device)
            choice = _parse(remembered.read(path).get(shape.text()), shape)
            if choice is None:
                with torch.inference_mode(), torch.autocast(shape.device_type, enabled=False):
                    calls = timing.GRAPHED if shape.graph else 0
                    watch = partial(timing.stopwatch, device=shape.device, graph=calls, clock=self._clock)
                    found = race(self._make(shape, sparse), self._clock, watch, self._work)
                choice = decide(found.ms, found.rounds)
                if shape.device == "cpu" and found.own < OWN:  # the CPU waits for a GPU
                    choice = replace(choice, reason=f"{choice.reason}; the processor was busy", busy=True)
                    tries = self._until.get(shape, (0.0, 0))[1]
                    wait = AGAIN_S[tries] if tries < len(AGAIN_S) else math.inf  # always busy: it stays
                    self._until[shape] = self._clock() + wait, tries + 1
                else:
                    remembered.add(path, machine, shape.text(), asdict(choice))
            self._known[shape] = choice
            return choice

    def settle(self, model: str, shapes: Collection[Shape], device: str, run: Callable[[], Race]) -> bool | None:
        """Whether a model that makes calls of these shapes is faster with dense attention in them, which they then have.

        Args:
            model: names it.
            run: races the model as decided, "decided", with the other, "dense". Only where no process did so before here.

        None: the processor was busy, and it is not known.
        """
        key = f"{model}: " + "; ".join(sorted(shape.text() for shape in shapes))
        with self._lock:
            machine, path = self._machine(device)
        known = remembered.read(path).get(key)
        if isinstance(known, dict) and isinstance(known.get("slower"), bool):
            slower = known["slower"]
        else:
            found = run()
            slower = found.ms["decided"] > SLOWER * found.ms["dense"]
            if device == "cpu" and found.own < OWN:
                return None
            remembered.add(path, machine, key, {"slower": slower, "ms": found.ms, "rounds": found.rounds})
        if slower:
            reason = "the whole model is faster with dense attention"
            for each in shapes:
                choice = self._known[each]
                self._known[each] = replace(choice, taken=choice.dense, reason=reason, busy=False)
        return slower

    def _machine(self, device: str) -> tuple[dict[str, str], Path | None]:
        """What measurements on a device depend on, and the file that they are kept in."""
        if device not in self._machines:
            machine = remembered.identity(device)
            self._machines[device] = machine, remembered.file_of(machine)
        return self._machines[device]

    def __deepcopy__(self, memo: dict[int, Any]) -> Chooser:
        return self  # copies of a model share what was measured

    def __reduce__(self) -> tuple[Callable[[bool], Chooser], tuple[bool]]:
        return _again, (self._withdrawn,)  # another process reads the disk's


def _again(withdrawn: bool) -> Chooser:
    chooser = Chooser()
    if withdrawn:
        chooser.withdraw()
    return chooser


def race(
    runs: Mapping[str, Callable[[], object]],
    clock: Callable[[], float] = time.perf_counter,
    watch: Callable[[Callable[[], object]], timing.Stopwatch] | None = None,
    work: Callable[[], float] = time.thread_time,
) -> Race:
    """Time candidates in turns, in alternating order, after a warm-up.

    clock: seconds; watch: makes what times a candidate, None: by the clock.

    The race ends when all others are `HOPELESS`, when the leader is clear after `SURE_ROUNDS`, or when the time is up.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    watches = {name: (watch or partial(timing.stopwatch, clock=clock))(run) for name, run in runs.items()}
    for read in [*watches.values(), *watches.values()]:
        read()
    racing, rounds, start, worked = list(runs), 0, clock(), work()
    while True:
        for name in racing if rounds % 2 == 0 else racing[::-1]:
            times[name].append(watches[name]())
        rounds += 1
        if rounds < FIRST_ROUNDS:
            continue
        leader = min(racing, key=lambda name: statistics.median(times[name]))
        hopeless = HOPELESS * statistics.median(times[leader])
        racing = [name for name in racing if min(times[name]) <= hopeless]
        spent = clock() - start
        out_of_time = spent >= (BUDGET_S if rounds >= MIN_ROUNDS else LIMIT_S)
        if len(racing) == 1 or out_of_time or (rounds >= SURE_ROUNDS and _clear(times, leader, racing)):
            ms = {name: statistics.median(each) for name, each in times.items()}
            return Race(ms, rounds, (work() - worked) / max(spent, 1e-9))


def decide(ms: Mapping[str, float], rounds: int) -> Choice:
    """The first of `PREFERENCE` whose median is within `MARGIN` of the lowest."""
    ranked = sorted(ms, key=PREFERENCE.index)
    fastest = min(ranked, key=lambda name: ms[name])
    taken = next(name for name in ranked if ms[name] <= MARGIN * ms[fastest])
    reason = f"fastest of {len(ms)} in {rounds} rounds"
    if taken != fastest:
        reason = f"as fast as {fastest} to {MARGIN - 1:.0%}, and preferred; {rounds} rounds".replace("%", " %")
    return Choice(taken, {name: ms[name] for name in ranked}, rounds, reason)


def _clear(times: Mapping[str, list[float]], leader: str, racing: list[str]) -> bool:
    upper = statistics.quantiles(times[leader], n=4)[2]
    return all(upper < statistics.quantiles(times[name], n=4)[0] for name in racing if name != leader)


def _parse(found: Any, shape: Shape) -> Choice | None:
    """A choice as it was written; None where it is anything else, or not of this shape's candidates."""
    try:
        choice = Choice(str(found["taken"]), dict(found["ms"]), int(found["rounds"]), str(found["reason"]))
        whole = all(isinstance(t, int | float) and 0 < t < math.inf for t in choice.ms.values())
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    return choice if whole and choice.taken in {shape.sparse, *DENSE} & choice.ms.keys() else None
