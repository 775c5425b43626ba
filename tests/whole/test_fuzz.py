"""A few hundred drawn inputs of each class: one line or a result, never anything else (`make fuzz` draws thousands)."""

import contextlib
import sys
from types import SimpleNamespace

import pytest

from fuzz import harness
from sparsify.errors import BadFile


@pytest.mark.parametrize("name", harness.classes())
def test_a_drawn_input_is_taken_or_refused_in_one_line(name, tmp_path):
    module = harness.classes()[name]
    tally = harness.run(module, module.SUITE, 0, tmp_path)
    print(tally.table())
    assert tally.faults == []
    assert {"accepted", "refused"} <= {each for counts in tally.counts.values() for each in counts}  # both are drawn


def test_the_harness_counts_every_kind_of_fault(tmp_path):
    def refuse(words):
        raise BadFile(words)

    def spin():
        while True:
            with contextlib.suppress(Exception):  # as code that catches every error
                sum(range(1000))

    runs = {
        "taken": lambda: None,
        "refused": lambda: refuse("no file x"),
        "says nothing": lambda: refuse(""),
        "wrong type": lambda: 1 + "x",
        "exits": sys.exit,
        "accepted wrongly": lambda: (_ for _ in ()).throw(harness.Fault("loads, then fails")),
        "endless": spin,
    }
    drawn = [harness.Case(name, name, run, 0.2) for name, run in runs.items()]
    tally = harness.run(SimpleNamespace(cases=lambda seed, folder: drawn), len(drawn), 0, tmp_path)
    outcomes = {kind: next(iter(counts)) for kind, counts in tally.counts.items()}
    assert outcomes == dict.fromkeys(runs, "fault") | {"taken": "accepted", "refused": "refused"}
    assert len(tally.faults) == 5 and "over 0.2 s" in tally.faults[-1]
