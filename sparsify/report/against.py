"""Dense and converted in several runtimes as rows of a table, and one plain verdict."""

from __future__ import annotations

from sparsify.measure.against import Against
from sparsify.measure.latency import Timing
from sparsify.report import words
from sparsify.report.profile import NO_DENSE

COLUMNS = ("runtime", "dense, ms", "converted, ms", "same runtime", "best dense")
MEASURED = (
    "Measured: ms per batch, median (p10-p90); speed of converted beside dense in the same runtime and the best dense"
)


def rows(a: Against) -> list[tuple[str, ...]]:
    """A row for each runtime: both times with their spread, and both speeds (above 1x: converted is faster)."""
    return [
        (name, _ms(pair.dense), _ms(pair.converted), _speed(pair.speed), _speed(a.speed(name)))
        for name, pair in a.pairs.items()
    ]


def notes(a: Against) -> list[str]:
    """What was left out and why, what else is to be known of the figures, and their conditions."""
    left_out = [f"{name} is left out: {why}" for name, why in a.left_out.items()]
    return [*left_out, *a.notes, conditions(a)]


def conditions(a: Against) -> str:
    """Where and how it was measured, in one line."""
    c = a.conditions
    versions = ", ".join(f"{name} {version}" for name, version in {"torch": c["torch"], **c["runtimes"]}.items())
    return (
        f"{words.device(c)}, {words.threads(c['threads'])}, {c['dtype']}, batch {c['batch_size']}, "
        f"{words.rectangle(c['img_size'])}, {c['runs']} interleaved runs, {versions}"
    )


def verdict(a: Against) -> str:
    """One plain sentence: the fastest converted way beside the best dense way. Medians within their errors are alike."""
    dense, converted = a.dense_of(a.best_dense), a.converted_of(a.best_converted)
    if dense is None and converted is not None:
        return f"{NO_DENSE} Converted is fastest in {a.best_converted}, {words.plain(converted.median)} ms."
    if dense is None or converted is None:
        return "No runtime here can run the converted model: nothing is compared."
    ratio = dense.median / converted.median
    ways = (
        f"{a.best_converted} {words.plain(converted.median)} ms against the best dense way, "
        f"{a.best_dense} {words.plain(dense.median)} ms"
    )
    if not dense.differs(converted):
        return f"Converted is as fast as dense here, within what the runs can tell ({ratio:.2f}x): {ways}."
    if ratio > 1:
        return f"Converted is faster than dense here, {ratio:.2f}x: {ways}."
    faster = ", ".join(_faster(a))
    if faster:
        return (
            f"Converted is slower than dense here ({ratio:.2f}x): {ways}; it is faster only beside dense in {faster}."
        )
    return f"Converted is slower than dense here, in every runtime ({ratio:.2f}x): {ways}."


def markdown(a: Against) -> str:
    """Table, verdict and notes as GitHub Markdown."""
    lines = ["# Dense and converted by runtime", f"{MEASURED}.", words.markdown_table(COLUMNS, rows(a))]
    lines += [f"**{words.markdown(verdict(a))}**", *(words.markdown(line) for line in notes(a))]
    return "\n\n".join(lines) + "\n"


def _faster(a: Against) -> list[str]:
    """The runtimes in which converted is faster than dense in the same, with the speed: 'eager (1.14x)'."""
    found = []
    for name, pair in a.pairs.items():
        if pair.dense is not None and pair.converted is not None and pair.dense.differs(pair.converted):
            speed = pair.dense.median / pair.converted.median
            found += [f"{name} ({speed:.2f}x)"] if speed > 1 else []
    return found


def _ms(timing: Timing | None) -> str:
    return words.NOTHING if timing is None else f"{words.plain(timing.median)} ({words.spread(timing)})"


def _speed(ratio: float | None) -> str:
    return words.NOTHING if ratio is None else f"{ratio:.2f}x"
