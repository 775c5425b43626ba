"""Times of a converted model and of its dense original in several runtimes, and which dense way is the best here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsify.measure.latency import Timing

DENSE, CONVERTED = "dense", "converted"


@dataclass(frozen=True)
class Pair:
    """Both models in one runtime, ms per batch; None: there is no such model, or the runtime cannot run it."""

    dense: Timing | None
    converted: Timing | None

    @property
    def speed(self) -> float | None:
        """Dense over converted, of the medians: above 1 the converted model is faster."""
        return _ratio(self.dense, self.converted)


@dataclass(frozen=True)
class Against:
    """What `sparsify.jobs.against.profile_against` measured, all in one interleaved run."""

    pairs: Mapping[str, Pair]  # by runtime
    left_out: Mapping[str, str]  # what was not measured, and why: a runtime, or one model in it
    notes: tuple[str, ...]  # lines for people: answers that differ
    conditions: Mapping[str, Any]

    @property
    def best_dense(self) -> str | None:
        """The runtime in which dense is fastest; None without dense figures."""
        return _fastest({name: pair.dense for name, pair in self.pairs.items()})

    @property
    def best_converted(self) -> str | None:
        """The runtime in which the converted model is fastest."""
        return _fastest({name: pair.converted for name, pair in self.pairs.items()})

    def dense_of(self, runtime: str | None) -> Timing | None:
        """Time of dense in a runtime."""
        return None if runtime is None else self.pairs[runtime].dense

    def converted_of(self, runtime: str | None) -> Timing | None:
        """Time of the converted model in a runtime."""
        return None if runtime is None else self.pairs[runtime].converted

    def speed(self, runtime: str) -> float | None:
        """The best dense way over the converted model in `runtime`, of the medians: above 1 the converted one is faster."""
        return _ratio(self.dense_of(self.best_dense), self.pairs[runtime].converted)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, the best runtimes and the speeds."""
        return {
            "ms": {name: asdict(pair) for name, pair in self.pairs.items()},
            "best_dense": self.best_dense,
            "best_converted": self.best_converted,
            "speed_same_runtime": {name: pair.speed for name, pair in self.pairs.items()},
            "speed_best_dense": {name: self.speed(name) for name in self.pairs},
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
            "conditions": dict(self.conditions),
        }


def _ratio(dense: Timing | None, converted: Timing | None) -> float | None:
    return None if dense is None or converted is None else dense.median / converted.median


def _fastest(times: Mapping[str, Timing | None]) -> str | None:
    known = {name: timing.median for name, timing in times.items() if timing is not None}
    return min(known, key=known.__getitem__, default=None)
