"""Messages name fields; Python shows the argument, the command line the option."""

import pytest

from sparsify.errors import BadFile, UsageError, as_arguments, as_options, field, one_line


@pytest.mark.parametrize("name,option", [("weights", "--weights"), ("num_classes", "--num-classes")])
def test_a_field_is_an_argument_in_python_and_an_option_on_the_command_line(name, option):
    error = UsageError(f"give {field(name)} FILE")
    assert str(error) == f"give {name} FILE" and error.for_command_line() == f"give {option} FILE"
    assert as_arguments(error.args[0]) == str(error) and as_options(error.args[0]) == error.for_command_line()


def test_an_error_quoted_in_another_keeps_its_fields():
    inner = UsageError(f"give {field('img_size')}")
    outer = BadFile(f"the folder cannot be read: {one_line(inner)}")
    assert outer.for_command_line().endswith("give --img-size") and str(outer).endswith("give img_size")


def test_one_line_of_any_error():
    assert one_line(OSError(2, "No such file")) == "[Errno 2] No such file"
    assert one_line(ValueError("a\n b")) == "a b" and one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(one_line(ValueError("x" * 300))) == 200
