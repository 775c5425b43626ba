"""Text of recipes and of `--set`: bounded YAML with JSON's scalars, and errors in plain words."""

import time
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import sparsify
from sparsify import config, recipe
from sparsify.config import Frozen
from sparsify.errors import UsageError
from sparsify.files import read_yaml, to_yaml
from sparsify.recipe import Recipe, load_recipe

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)

# the reader


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


@pytest.mark.parametrize("text", ["[]", "0", "false", "''", "3"])
def test_a_recipe_is_fields_with_values(tmp_path, text):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UsageError, match="own.yaml: expected fields with values"):
        load_recipe(str(tmp_path / "own.yaml"))
    (tmp_path / "own.yaml").write_text("# nothing said: the defaults\n")
    assert load_recipe(str(tmp_path / "own.yaml")) == Recipe()


def test_no_error_repeats_a_large_value(tmp_path):
    for value in ("[" + "0.5, " * 9000 + "2]", "x" * 60_000, "9" * 5001):
        with pytest.raises(UsageError) as error:
            Recipe().set([f"sparsity.keep={value}"])
        assert len(str(error.value)) < 300
    with pytest.raises(UsageError, match=r"^seed: expected a number below .*\(given: a number of about 4999 digits\)$"):
        Recipe().override(seed=10**4999)


# words


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sparsity.keep=x", "sparsity.keep: expected a number, 'dense' or a list (given: 'x')"),
        ("sparsity.keep=2", "sparsity.keep: expected a number of at most 1, 'dense' or a list (given: 2)"),
        ("sparsity.keep=[0.5, true]", "sparsity.keep.1: expected a number or 'dense' (given: True)"),
        ("sparsity.rank=[[1, 2], [3, 0]]", "sparsity.rank.1.1: expected a number of at least 1 (given: 0)"),
        ("sparsity.tile=[1, 2, 3]", "sparsity.tile: expected 2 values (given: [1, 2, 3])"),
        ("sparsity.tokens={stages: [a]}", "sparsity.tokens.stages.0: expected a whole number (given: 'a')"),
        ("stages.0.keep={start: 2}", "stages.0.keep.start: expected a number of at most 1 (given: 2)"),
        ("stages.0.optimiser.lr=0", "stages.0.optimiser.lr: expected a number above 0 (given: 0)"),
        ("stages.0.optimiser.lr=1e999", "stages.0.optimiser.lr: expected a finite number (given: inf)"),
        ("stages.0.cache_teacher=3", "stages.0.cache_teacher: expected true or false (given: 3)"),
        ("stages.0.augmentation.ratio=[0, 1]", "stages.0.augmentation.ratio.0: expected a number above 0 (given: 0)"),
        ("stages=4", "stages: expected a list (given: 4)"),
        ("stages.0=4", "stages.0: expected fields with values (given: 4)"),
        ("description=3", "description: expected text (given: 3)"),
        ("repair={layer: 3}", "repair: unknown field 'layer'; did you mean layers?"),
    ],
)
def test_errors_say_in_plain_words_what_is_expected(assignment, message):
    with pytest.raises(UsageError) as error:
        load_recipe("distill").set([assignment])
    assert error.value.for_command_line() == f"--set {message}"


def test_an_argument_is_named_as_the_caller_named_it():
    for given_, words in (({"keep": 2}, "keep: expected"), ({"tokens": {"keep": 3}}, "tokens.keep: expected")):
        with pytest.raises(UsageError, match=f"^{words}"):
            Recipe().override(**given_)
    with pytest.raises(UsageError, match="^unknown argument 'kep'; did you mean keep"):
        sparsify.convert("digits", kep=0.1)
    with pytest.raises(UsageError) as error:
        config.target(3, None)
    assert error.value.for_command_line().startswith("--target-macs: expected a number of at most 1")


def numbers_in(annotation):
    """Whether a number may stand there, alone or in a list."""
    return annotation in (int, float) or any(map(numbers_in, typing.get_args(annotation)))


MODELS = [each for each in (*vars(config).values(), *vars(recipe).values()) if isinstance(each, type)]
FIELDS = [
    (model, name)
    for model in dict.fromkeys(MODELS)
    if issubclass(model, Frozen) and model is not Frozen
    for name, field in model.model_fields.items()
    if numbers_in(field.annotation)
]


@pytest.mark.parametrize(
    "value", [True, False, "1", "yes", float("nan"), float("inf"), [True], ["1"], [[True]], -(10**400)]
)
def test_no_field_takes_something_else_for_a_number(value):
    assert len(FIELDS) > 40
    for model, name in FIELDS:
        with pytest.raises(ValidationError):
            model.model_validate({name: value})


def test_numbers_of_numpy_and_whole_floats_are_numbers():
    chosen = Recipe().override(rank=np.int64(3), keep=np.float32(0.5), calib_images=np.int32(7), seed=2.0)
    assert chosen.sparsity.rank == 3 and chosen.sparsity.keep == 0.5 and (chosen.calib_images, chosen.seed) == (7, 2)
    assert all(type(value) is int for value in (chosen.sparsity.rank, chosen.calib_images, chosen.seed))


def test_what_a_batch_size_of_yes_is(tmp_path):
    (tmp_path / "own.yaml").write_text("stages:\n  - {name: a, epochs: 1, batch_size: yes, losses: {logits: 1}}\n")
    with pytest.raises(UsageError, match=r"stages.0.batch_size: expected a whole number \(given: 'yes'\)"):
        load_recipe(str(tmp_path / "own.yaml"))
    assert Recipe().set(["sparsity.fold=no"]).sparsity.fold is False  # where truth is asked for
