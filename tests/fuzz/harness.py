"""What every drawn input must satisfy, and the count by kind.

A class of inputs is a module of this folder with

    SUITE                number of inputs that the test suite draws
    MANY                 number that `make fuzz` draws
    cases(seed, folder)  an endless iterator of `Case`, the same for the same seed; `folder` is empty and its own

A case is accepted (its `run` returns), refused (it raises `SparsifyError`, in one line without control characters), or a
fault: any other exception, a message that is not one line, too long, or too much memory.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sparsify.errors import SparsifyError

SECONDS = 10  # of the processor that a case may take; it may wait six times as long
EXPORT = 60  # the same, of one that writes a good model as a program: torch's exporter alone takes 8 to 19
MEMORY = 2e9  # bytes by which a case may raise the peak of the process
LONGEST = 2000  # characters of a message
OTHERS = ("__init__", "harness", "run")


class Case(NamedTuple):
    """One drawn input."""

    kind: str  # what the table counts it under
    name: str  # what was drawn, for the report of a fault
    run: Callable[[], object]
    seconds: float = SECONDS


class Fault(AssertionError):
    """What a case raises itself where something is wrong that is no exception: an accepted input that fails later, ..."""


class _TooLong(BaseException):
    """Past the limit; no `except Exception` holds it."""


@dataclass
class Tally:
    """What came of the cases of a class."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)  # by kind: accepted, refused, fault
    faults: list[str] = field(default_factory=list)  # one line each, with the number of the case
    slowest: float = 0.0  # seconds of the processor that a case took
    memory: float = 0.0  # bytes by which the peak of the process grew

    def table(self) -> str:
        """A row for each kind."""
        columns = ("accepted", "refused", "fault")
        rows = [
            ("", *columns),
            *((kind, *(str(c[name]) for name in columns)) for kind, c in sorted(self.counts.items())),
        ]
        total = sum(self.counts.values(), Counter())
        rows.append(("all", *(str(total[name]) for name in columns)))
        width = max(len(row[0]) for row in rows)
        lines = [f"{kind:<{width}}" + "".join(f"{cell:>10}" for cell in cells) for kind, *cells in rows]
        return "\n".join([*lines, f"slowest {self.slowest:.1f} s, memory {self.memory / 1e6:.0f} MB above the start"])


def classes() -> dict[str, Any]:
    """The modules with cases, by name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in OTHERS)
    return {name: importlib.import_module(f"fuzz.{name}") for name in names}


def run(module: Any, count: int, seed: int, folder: Path, first: int = 0) -> Tally:
    """Runs the cases `first` to `count` of a class; nothing that a case does stops it."""
    tally, before = Tally(), _peak()
    for number, case in islice(enumerate(module.cases(seed, folder)), first, count):
        start, peak = time.process_time(), _peak()
        outcome, why = _outcome(case)
        took, grown = time.process_time() - start, _peak() - peak
        if grown > MEMORY:
            outcome, why = "fault", f"{grown / 1e9:.1f} GB of memory; {why}"
        tally.counts.setdefault(case.kind, Counter())[outcome] += 1
        tally.slowest = max(tally.slowest, took)
        if outcome == "fault":
            tally.faults.append(f"seed {seed}, case {number}, {case.kind}, {case.name}: {why}")
    tally.memory = _peak() - before
    return tally


def command(*arguments: object) -> str:
    """The stdout of a command line, run in this process; `SparsifyError` where it refuses, `Fault` where it misbehaves."""
    from sparsify.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(each) for each in arguments])
            code: object = 0
        except SystemExit as end:
            code = end.code
    said = err.getvalue()
    if "error: unexpected " in said or "Traceback" in said:
        raise Fault(said.strip().splitlines()[-1])
    if hidden := control_characters(out.getvalue() + said):
        raise Fault(f"control characters reach the terminal: {hidden}")
    if code in (0, None):
        return out.getvalue()
    if code not in (1, 2) or not said.strip().splitlines()[-1].startswith("error: "):
        raise Fault(f"exit code {code}: {said[-200:]!r}")
    raise SparsifyError(said.strip().splitlines()[-1])


def control_characters(text: str) -> str:
    """Those that a terminal would obey or that break a line, as Python writes them; '' if there are none but newlines."""
    return "".join(sorted({repr(c) for c in text if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"}))


def _outcome(case: Case) -> tuple[str, str]:
    """accepted, refused or fault; and why, where it is a fault."""
    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, case.seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, 6 * case.seconds),
    }
    before = {number: signal.signal(number, _stop) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        case.run()
    except SparsifyError as error:
        message = error.for_command_line()
        if "\n" in message or control_characters(message) or not 0 < len(message) <= LONGEST:
            return "fault", f"not one line of plain text: {message[:300]!r}"
        return "refused", message
    except Fault as error:
        return "fault", str(error)
    except _TooLong:
        return "fault", f"over {case.seconds:g} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "fault", f"{type(error).__name__}: {str(error)[:200]!r} at {Path(where.filename).name}:{where.lineno}"
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return "accepted", ""


def _stop(number: int, frame: object) -> None:
    raise _TooLong


def _peak() -> float:
    """Peak of the process's memory, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
