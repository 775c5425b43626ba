"""JSON: what is not a whole, finite, reasonable tree is refused in one line."""

import pytest

from sparsify.errors import BadFile
from sparsify.files.plain_json import from_json, read_json, to_json


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "[1]", "null", "\udce9"])
def test_what_is_no_object_of_json_is_one_line(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(BadFile, match=r"^[^\n]*results.json (cannot be read as JSON|holds no results): [^\n]{1,120}$"):
        read_json(path)


def test_numbers_that_json_has_not_become_null():
    assert to_json({"a": [float("nan"), -float("inf"), 1.5], "b": (1,)}) == '{"a": [null, null, 1.5], "b": [1]}'
    assert from_json(to_json({"a": 0.1})) == {"a": 0.1}
