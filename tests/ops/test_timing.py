"""Stopwatches: what is timed on a CPU, and on a pretended GPU, eager and from graphs."""

import pytest
import torch

from helpers.fake_gpu import PretendedCuda
from sparsify.ops import auto, timing
from sparsify.ops.auto import Chooser
from sparsify.ops.spec import Kind, Shape, Spec


def test_on_a_cpu_one_call_is_timed_by_the_clock():
    ticks, calls = iter([1.0, 1.25]), []
    assert timing.stopwatch(lambda: calls.append(1), clock=lambda: next(ticks))() == 250
    assert calls == [1]


@pytest.mark.parametrize("ms", [0.001, 0.02, 2.0, 50.0])
def test_on_a_gpu_events_stand_around_as_many_calls_as_a_reading_needs(monkeypatch, ms):
    world, calls = PretendedCuda(monkeypatch), []

    def call():
        calls.append(1)
        world.now += ms

    read = timing.stopwatch(call, "cuda:0")
    assert read() == pytest.approx(ms) and len(calls) == 1
    assert read() == pytest.approx(ms)
    expected = {0.001: timing.MOST_CALLS, 0.02: 150, 2.0: 2, 50.0: 1}  # a reading of 3 ms, if 200 calls reach it
    assert len(calls) - 1 == expected[ms]


def test_from_a_graph_replays_are_timed_and_python_is_not(monkeypatch):
    world, calls = PretendedCuda(monkeypatch), []

    def call():
        calls.append(1)
        world.now += 0.5

    read = timing.stopwatch(call, "cuda:0", graph=20)
    assert world.captured == 1 and len(calls) == timing.WARM_UP + 20
    assert read() == pytest.approx(0.5 + 0.01 / 20) and world.replays == 1
    assert len(calls) == timing.WARM_UP + 20  # the function does not run again


SHAPE = Shape(
    1, 2, 17, 8, torch.float16, "cuda:1", 0, False, "input", "masked", Kind("head-folded", 8, 4),
    Spec.uniform(5, 1, "clusters", (4, 4), (2, 2)),
)  # fmt: skip


def test_decisions_of_a_gpu_are_kept_by_its_name_capability_and_tritons_version(monkeypatch, tmp_path):
    """And apart for calls that are replayed from graphs: there launches cost nothing."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    world = PretendedCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    launches = {"masked": 20, "sdpa": 1}

    def make(shape, sparse):
        def run(name):
            issued = 0 if world.capturing else 0.006 * launches[name]  # ms of Python
            world.now += max(issued, {"masked": 0.01, "sdpa": 0.02}[name])

        return {name: lambda name=name: run(name) for name in launches}

    chooser = Chooser(make)
    assert chooser.choose(SHAPE, None).taken == "sdpa"
    assert chooser.choose(SHAPE._replace(graph=True), None).taken == "masked"
    (file,) = (tmp_path / "auto").iterdir()
    kept = auto.remembered.from_json(file.read_text())
    assert kept["machine"]["device"] == "A GPU" and kept["machine"]["capability"] == "9.0"
    assert set(kept["machine"]) >= {"triton", "torch"} and len(kept["choices"]) == 2
    assert SHAPE._replace(device="cuda:0").text() == SHAPE.text()  # another GPU of that name
    again = Chooser(lambda *_: pytest.fail("measured again"))
    assert again.choose(SHAPE._replace(device="cuda:0"), None).taken == "sdpa"
