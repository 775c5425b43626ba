"""YAML of bounded size with JSON's scalars."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.files.plain_yaml import read_yaml, to_yaml

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("~", None),
        ("", None),
        ("true", True),
        ("FALSE", False),
        ("12", 12),
        ("-3", -3),
        ("1_000", 1000),
        ("0.5", 0.5),
        ("1e-4", 1e-4),
        ("5.0e-5", 5e-5),
        (".5", 0.5),
        ("yes", "yes"),
        ("no", "no"),
        ("2024-13-45", "2024-13-45"),
        ("2024-02-30 10:10:10", "2024-02-30 10:10:10"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        (".inf", ".inf"),
        ("'12'", "12"),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_scalars_are_those_of_json(text, value):
    found = read_yaml(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!int x", "line 1: tags such as 'tag:yaml.org,2002:int'"),
        ("a: !!timestamp x", "line 1: tags"),
        ("a: !x 1", "line 1: tags such as '!x'"),
        ("[" * 5000, "line 1: nested more than 20 deep"),
        ("- " * 5000, "line 1: nested more than 20 deep"),
        ("{a: " * 5000, "line 1: nested more than 20 deep"),
        (BOMB, "line 5: more than 10000 values"),
        ("&a [*a]", "alias of what it stands in"),
        ("a: *b", "undefined alias 'b'"),
        ("seed: 1\nx: 2\nseed: 3", "line 3: the field 'seed' is given twice"),
        ("? [a]\n: 1", "line 1: a list or mapping stands where a field's name is expected"),
        ("a: 1\n--- \nb: 2", "line 2: expected a single document"),
        ("a: [1", "line 1: "),
        ("x" * 70_000, "longer than 65536 characters"),
        ("a: \x1b", "unacceptable character"),
        ('"\\U00110000"', "range"),
        ('"\\UFFFFFFFF"', ""),  # the words are Python's, and change with it
    ],
)
def test_what_is_more_than_a_recipe_needs_is_one_line(text, words):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^[^\n]{1,200}$") as error:
        read_yaml(text)
    assert words in str(error.value) and time.monotonic() - start < 10


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(TREES | st.sampled_from(["1e-4", "yes", "012", "null", "2024-01-01", "<<", "1_0", ".5"]))
def test_what_is_written_is_read_again(tree):
    found = read_yaml(to_yaml({"field": tree}))
    assert found == {"field": tree}
