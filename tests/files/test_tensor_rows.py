"""A file of rows that come one after the other is the file that safetensors writes of all of them."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sparsify.errors import BadFile, SparsifyError
from sparsify.files import tensor_rows as module
from sparsify.files.tensor_rows import check_replaceable, tensor_rows

text = st.text(max_size=12)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(st.lists(st.tuples(text, st.booleans()), min_size=1, max_size=9), st.integers(1, 4), dtypes, st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_rows_and_names_come_back(tmp_path_factory, images, batch, dtype, width):
    path = tmp_path_factory.mktemp("rows") / "x.safetensors"
    names = [name for name, good in images if good] or [images[0][0]]
    rows = torch.randn(len(names), width, 3).to(dtype)
    with tensor_rows(path, "features", {"kind": "patch"}, [name for name, _ in images]) as file:
        for start in range(0, len(names), batch):
            file.add(names[start : start + batch], rows[start : start + batch])
    with safe_open(path, "pt") as read:
        assert torch.equal(read.get_tensor("features"), rows) and read.metadata()["kind"] == "patch"
        assert json.loads(read.metadata()["names"]) == names


def test_nothing_half_written_is_left(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), tensor_rows(path, "x", {}, ["a", "b"]) as file:
        file.add(["a"], torch.zeros(1, 2))
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_names_beyond_what_a_header_takes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 200)
    with pytest.raises(SparsifyError, match="set limit"), tensor_rows(tmp_path / "x", "x", {}, ["a" * 99] * 3) as file:
        file.add(["a" * 99], torch.zeros(1, 2))


def test_only_a_file_of_the_same_kind_is_replaced(tmp_path):
    path = tmp_path / "x.safetensors"
    check_replaceable(path, "kind")
    with tensor_rows(path, "x", {"kind": "a"}, ["a"]) as file:
        file.add(["a"], torch.zeros(1, 2))
    check_replaceable(path, "kind")
    with pytest.raises(BadFile, match="choose another output"):
        check_replaceable(path, "other")
    path.write_bytes(b"no tensors")
    with pytest.raises(BadFile, match="choose another output"):
        check_replaceable(path, "kind")
