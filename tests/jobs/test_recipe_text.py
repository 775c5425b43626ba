"""Text of recipes and of `--set`: errors in plain words, and numbers that are numbers."""

import typing

import numpy as np
import pytest
from pydantic import ValidationError

import sparsify
from sparsify import config, recipe
from sparsify.config import Frozen
from sparsify.errors import UsageError
from sparsify.recipe import Recipe, load_recipe


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
        ("sparsity.keep=[0.5, true]", "sparsity.keep.1: expected a number, 'dense' or a list (given: True)"),
        ("sparsity.keep=[[0.1, 2]]", "sparsity.keep.0.1: expected a number of at most 1 (given: 2)"),
        ("sparsity.keep=[[0.1, dense]]", "sparsity.keep.0.1: expected a number (given: 'dense')"),
        ("sparsity.cells=[[[4, x]]]", "sparsity.cells.0.0.1: expected a whole number (given: 'x')"),
        ("sparsity.spread=alle", "sparsity.spread: expected 'none', 'rank' or 'all' (given: 'alle')"),
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
