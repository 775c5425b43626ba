"""What is said of a GPU."""

from types import SimpleNamespace

import pytest
import torch

from sparsify.measure.conditions import PROFILE, conditions
from sparsify.ops import devices
from sparsify.processes import Compute


@pytest.mark.parametrize("clock, words", [(1755, "1755 MHz now"), (None, "at most 1980 MHz")])
def test_conditions_of_a_gpu_name_its_versions_and_clock(monkeypatch, clock, words):
    def rate(device):
        if clock is None:
            raise ModuleNotFoundError("pynvml")
        return clock

    found = SimpleNamespace(major=9, minor=0, multi_processor_count=132, clock_rate=1_980_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "clock_rate", rate)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(devices, "_driver", lambda: "550.54.15")
    monkeypatch.setattr(Compute, "torch_device", torch.device("cuda:0"))
    told = conditions(PROFILE, Compute("cuda"), runs=3)
    assert told["device_name"] == "A GPU" and told["device"] == "cuda:0"
    for part in ("capability 9.0", "132 multiprocessors", "CUDA ", "driver 550.54.15", words):
        assert part in told["device_details"]


def test_of_a_cpu_nothing_is_added():
    assert "device_details" not in conditions(PROFILE, Compute(), runs=3)
    assert devices.gpu_versions(torch.device("cpu")) == {}
