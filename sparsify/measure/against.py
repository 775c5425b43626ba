"""Times of a converted model and of its dense original in several runtimes, and which dense way is the best here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sparsify.measure.latency import Timing, summary

DENSE, CONVERTED = "dense", "converted"


class Way(NamedTuple):
    """One model in one runtime."""

    runtime: str
    model: str  # DENSE or CONVERTED
    attention: str = ""  # of a converted model's program, where there are several to choose from: dense or sparse


@dataclass(frozen=True)
class Speed:
    """The converted model beside a dense one, round by round of one interleaved run."""

    ratio: float  # median over the rounds of dense time / converted time: above 1 the converted model is faster
    won: int  # rounds in which it was faster
    runs: int

    @property
    def clear(self) -> bool:
        """Whether one of them is faster: it won so often as two standard errors of throws of a coin do not explain.

        Noise of the machine falls on both. Fewer than 5 rounds tell nothing.
        """
        return abs(2 * self.won - self.runs) > 2 * math.sqrt(self.runs)


@dataclass(frozen=True)
class Pair:
    """Both models in one runtime, ms per batch; None: there is no such model, or the runtime cannot run it."""

    dense: Timing | None
    converted: Timing | None
    attention: str = ""  # see `Way`; of the faster program
    same_runtime: Speed | None = None  # converted beside dense in this runtime
    best_dense: Speed | None = None  # beside the best dense way


@dataclass(frozen=True)
class Against:
    """What `sparsify.jobs.against.profile_against` measured, all in one interleaved run."""

    pairs: Mapping[str, Pair]  # by runtime
    left_out: Mapping[str, str]  # what was not measured, and why: a runtime, or one model in it
    notes: tuple[str, ...]  # lines for people: answers that differ
    conditions: Mapping[str, Any]

    @property
    def best_dense(self) -> str | None:
        """The runtime in which dense is fastest, by the medians; None without dense figures."""
        return _fastest({name: pair.dense for name, pair in self.pairs.items()})

    @property
    def best_converted(self) -> str | None:
        """The runtime in which the converted model is fastest."""
        return _fastest({name: pair.converted for name, pair in self.pairs.items()})

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields and the best runtimes."""
        return {
            "best_dense": self.best_dense,
            "best_converted": self.best_converted,
            "runtimes": {name: asdict(pair) for name, pair in self.pairs.items()},
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
            "conditions": dict(self.conditions),
        }


def compare(ms: Mapping[Way, Sequence[float]]) -> dict[str, Pair]:
    """Both models in each runtime, from the times of every round of one interleaved run, ms."""
    times = {way: summary(list(each)) for way, each in ms.items()}
    dense = {way.runtime: way for way in ms if way.model == DENSE}
    best = min(dense.values(), key=lambda way: times[way].median, default=None)

    def speed(beside: Way | None, converted: Way | None) -> Speed | None:
        if beside is None or converted is None:
            return None
        ratios = [d / c for d, c in zip(ms[beside], ms[converted], strict=True)]
        return Speed(statistics.median(ratios), sum(ratio > 1 for ratio in ratios), len(ratios))

    pairs = {}
    for runtime in dict.fromkeys(way.runtime for way in ms):
        programs = [way for way in ms if way.runtime == runtime and way.model == CONVERTED]
        own, fastest = dense.get(runtime), min(programs, key=lambda way: times[way].median, default=None)
        pairs[runtime] = Pair(
            None if own is None else times[own],
            None if fastest is None else times[fastest],
            "" if fastest is None else fastest.attention,
            speed(own, fastest),
            speed(best, fastest),
        )
    return pairs


def _fastest(times: Mapping[str, Timing | None]) -> str | None:
    known = {name: each.median for name, each in times.items() if each is not None}
    return min(known, key=known.__getitem__, default=None)
