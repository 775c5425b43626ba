"""The Triton kernels without a GPU: computed by Triton's interpreter, and compiled ahead of time for four GPUs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from helpers import aot
from sparsify.ops.gpu import available

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="triton comes with PyTorch for CUDA")


@pytest.mark.parametrize(
    "interpreted",
    ["1", pytest.param("0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_kernels_equal_their_references(interpreted):
    """`helpers/gpu_cases.py`, in a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": interpreted, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/helpers/gpu_cases.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr


class Limit(NamedTuple):
    """What a kernel may take; with more of it fewer programs run at once."""

    registers: int  # of a thread, sm_80 to sm_90
    vgprs: int  # of a thread, gfx942
    shared: int  # bytes of a program
    multiplies: bool = False  # on tensor cores


LIMITS = {
    "fitted": Limit(64, 48, 4096),
    "logits": Limit(64, 64, 1024),
    "attended": Limit(32, 32, 0),
    "rank": Limit(64, 64, 1024),
    "nearest": Limit(200, 200, 49_152, True),
    "plan": Limit(64, 48, 4096),
    "choose": Limit(64, 48, 4096),
    "merge": Limit(168, 128, 8192),
    "sized": Limit(224, 320, 65_536, True),
}
LAUNCHES = [launch for call in aot.calls(torch.bfloat16, 8, 196, 384, 64) for launch in aot.recorded(call)]


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.kernel.fn.__name__)
def test_a_kernel_compiles_within_its_limits(launch):
    limit = LIMITS[launch.kernel.fn.__name__]
    for target in aot.TARGETS:
        found = aot.compiled(launch, target)
        assert found.spills == 0, (target, found)
        assert found.registers <= (limit.registers if target in aot.CUDA else limit.vgprs), (target, found)
        assert found.shared <= limit.shared, (target, found)
        assert found.tensor_cores == limit.multiplies, (target, found)


def test_every_kernel_has_a_limit():
    assert {launch.kernel.fn.__name__ for launch in LAUNCHES} == set(LIMITS)


# ---- which calls the kernels compute ----


def on_gpu(monkeypatch, capability=(8, 0), triton=True):
    monkeypatch.setattr(available, "capability", lambda index: capability)
    monkeypatch.setattr(available, "has_triton", lambda: triton)


def test_kernels_compute_on_gpus_from_ampere_on_where_triton_is(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    on_gpu(monkeypatch)
    with FakeTensorMode():
        x = torch.empty(2, 3, 16, device="cuda")
        assert available.usable(x) and available.usable(x.half(), None, x)
        assert not available.usable(x.double())
        assert not available.usable(x.cpu())
        leaf = torch.empty(2, 3, 16, device="cuda", requires_grad=True)
        assert not available.usable(leaf) and not available.usable(x, leaf)
        with torch.no_grad():
            assert available.usable(leaf)
        on_gpu(monkeypatch, (7, 5))
        assert not available.usable(x)
        on_gpu(monkeypatch, triton=False)
        assert not available.usable(x)


def test_kernels_are_not_loaded_where_none_runs():
    code = """
import sys, torch
from sparsify.nn.tokens import TokenStage, TokenState
TokenStage("merge", 0.5, 1)(torch.rand(1, 9, 16), torch.rand(1, 8), TokenState(8))
print([name for name in sys.modules if name.startswith("sparsify.ops.gpu.") and "_kernels" in name])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr
