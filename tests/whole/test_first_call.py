"""A model's first call may be inside any transformation: kernels are found there too, and the numbers are the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.families import build, images
from sparsify.config import SparsityConfig
from sparsify.nn import graft
from sparsify.ops.cpu import kernels

WAYS = {
    "trace": lambda model, x: torch.jit.trace(model, x)(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "compile": lambda model, x: torch.compile(model, backend="aot_eager")(x),
    "vmap": lambda model, x: torch.func.vmap(lambda one: model(one[None])[0])(x),
    "functional_call": lambda model, x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
    "func.jvp": lambda model, x: torch.func.jvp(model, (x,), (x,))[0],
}


def sparse():
    return graft.graft(build("deit"), SparsityConfig(keep=0.3, rank=8, cells=(2, 2)))


@pytest.fixture
def unprobed():
    """As in a new process: nobody has asked for the kernels."""
    expected = kernels.available()
    kernels._load.cache_clear()
    yield expected
    assert kernels.available() == expected  # and a failure inside was not kept
    kernels._load.cache_clear()


@pytest.mark.parametrize("way", WAYS)
def test_kernels_are_found_in_the_first_call(unprobed, way):
    torch.compiler.reset()
    model = sparse()
    x = images(model)
    torch.testing.assert_close(WAYS[way](model, x), model(x), atol=1e-4, rtol=1e-4)


def test_a_trace_is_the_first_call_of_a_process():
    """A new process also loads the library inside the trace; a warning would be an error."""
    if reason := kernels.available():
        pytest.skip(f"no CPU kernels here: {reason}")
    code = """
import torch
from test_first_call import images, kernels, sparse
model = sparse()
with torch.no_grad():
    traced = torch.jit.trace(model, images(model))
assert kernels._load()[0] > 0 and '"cpu"' in str(traced.inlined_graph)
"""
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, here.parents[1])))}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
