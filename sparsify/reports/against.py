"""Dense and converted in several runtimes as rows of a table, and one plain verdict."""

from __future__ import annotations

from sparsify.measure.against import Against, Speed
from sparsify.measure.latency import Timing
from sparsify.reports import words
from sparsify.reports.profile import NO_DENSE

COLUMNS = ("runtime", "dense, ms", "converted, ms", "same runtime", "best dense")
MEASURED = (
    "Measured: ms per batch, median (p10-p90). Speed of converted beside dense in the same runtime, and beside the best "
    "dense way: above 1x it is faster"
)
ATTENTION = {"dense": "dense, over the tokens present", "sparse": "sparse"}
BUSY = 1.5  # p90 over p10 of the best dense way on a machine that does other work


def rows(a: Against) -> list[tuple[str, ...]]:
    """A row for each runtime: both times with their spread, and both speeds."""
    return [
        (name, _ms(pair.dense), _ms(pair.converted), _speed(pair.same_runtime), _speed(pair.best_dense))
        for name, pair in a.pairs.items()
    ]


def notes(a: Against) -> list[str]:
    """What was left out and why, what else is to be known of the figures, and their conditions."""
    left_out = [f"{name} is left out: {why}" for name, why in a.left_out.items()]
    return [*left_out, *_attention(a), *a.notes, *_busy(a), conditions(a)]


def conditions(a: Against) -> str:
    """Where and how it was measured, in one line."""
    c = a.conditions
    versions = ", ".join(f"{name} {version}" for name, version in {"torch": c["torch"], **c["versions"]}.items())
    return (
        f"{words.device(c)}, {words.threads(c['threads'])}, {c['dtype']}, batch {c['batch_size']}, "
        f"{words.rectangle(c['img_size'])}, {c['runs']} interleaved runs, {versions}"
    )


def verdict(a: Against) -> str:
    """One plain sentence: the fastest converted way beside the best dense way."""
    if a.best_converted is None:
        return "No runtime here can run the converted model: nothing is compared."
    converted = f"{a.best_converted} {_median(a.pairs[a.best_converted].converted)} ms"
    speed = a.pairs[a.best_converted].best_dense
    if a.best_dense is None or speed is None:
        return f"{NO_DENSE} Converted is fastest in {converted}."
    ways = f"{converted} against the best dense way, {a.best_dense} {_median(a.pairs[a.best_dense].dense)} ms"
    if not speed.clear:
        won = f"faster in {speed.won} of {speed.runs} runs"
        return f"Converted is as fast as dense here, as far as the runs tell ({_speed(speed)}, {won}): {ways}."
    if speed.ratio > 1:
        return f"Converted is faster than dense here, {_speed(speed)}: {ways}."
    won = ", ".join(
        f"{name} ({_speed(pair.same_runtime)})"
        for name, pair in a.pairs.items()
        if pair.same_runtime is not None and pair.same_runtime.clear and pair.same_runtime.ratio > 1
    )
    if won:
        return (
            f"Converted is slower than dense here ({_speed(speed)}): {ways}; it is faster only beside dense in {won}."
        )
    return f"Converted is slower than dense here, in every runtime ({_speed(speed)}): {ways}."


def markdown(a: Against) -> str:
    """Table, verdict and notes as GitHub Markdown."""
    lines = ["# Dense and converted by runtime", f"{MEASURED}.", words.markdown_table(COLUMNS, rows(a))]
    lines += [f"**{words.markdown(verdict(a))}**", *(words.markdown(line) for line in notes(a))]
    return "\n\n".join(lines) + "\n"


def _attention(a: Against) -> list[str]:
    """Which attention the converted programs have, where there was a choice."""
    kinds = {name: pair.attention for name, pair in a.pairs.items() if pair.attention}
    found = {said: [name for name, own in kinds.items() if own == kind] for kind, said in ATTENTION.items()}
    said = "; ".join(f"{', '.join(names)}: {kind}" for kind, names in found.items() if names)
    return [f"attention of the converted programs, the faster kind: {said}"] if said else []


def _busy(a: Against) -> list[str]:
    """A line where the spread of the best dense way tells of other work."""
    dense = None if a.best_dense is None else a.pairs[a.best_dense].dense
    if dense is None or dense.p90 <= BUSY * dense.p10:
        return []
    return [f"times vary {dense.p90 / dense.p10:.1f}x from p10 to p90: measure again while nothing else runs here"]


def _ms(timing: Timing | None) -> str:
    return words.NOTHING if timing is None else f"{_median(timing)} ({words.spread(timing)})"


def _median(timing: Timing | None) -> str:
    return words.NOTHING if timing is None else words.plain(timing.median)


def _speed(speed: Speed | None) -> str:
    return words.NOTHING if speed is None else f"{speed.ratio:.2f}x"
