"""A few hundred drawn inputs of each class: one line or a result, never anything else (`make fuzz` draws thousands)."""

import pytest

from fuzz import harness


@pytest.mark.parametrize("name", harness.classes())
def test_a_drawn_input_is_taken_or_refused_in_one_line(name, tmp_path):
    module = harness.classes()[name]
    tally = harness.run(module, module.SUITE, 0, tmp_path)
    print(tally.table())
    assert tally.faults == []
    assert {"accepted", "refused"} <= {each for counts in tally.counts.values() for each in counts}  # both are drawn
