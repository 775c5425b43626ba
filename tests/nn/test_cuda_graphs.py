"""Replays of CUDA graphs: when a call is one, by a pretended `torch.cuda` over tensors of the CPU."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers.fake_gpu import PretendedCuda
from sparsify.errors import UsageError
from sparsify.nn import cuda_graphs, graft
from sparsify.nn.cuda_graphs import Graphed


class Model(nn.Module):
    """Counts its eager calls; takes `ms` on the pretended GPU."""

    num_classes = 3

    def __init__(self, world: PretendedCuda) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3).requires_grad_(False)
        self.world, self.calls, self.ms = world, 0, 1.0

    def forward(self, x, scale=1.0):
        self.calls += 1
        self.world.now += self.ms
        return self.head(x) * scale


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "check", lambda device: None)
    made = PretendedCuda(monkeypatch)
    watch = cuda_graphs.timing.stopwatch
    monkeypatch.setattr(cuda_graphs.timing, "stopwatch", lambda call, device: watch(call, "cuda"))
    return made


def test_each_shape_is_captured_once_and_replayed(world):
    model = Model(world)
    graphed = Graphed(model)
    for n in (2, 3, 2, 2):
        graphed(torch.randn(n, 4))
    assert world.captured == 2 and model.calls == 2 * (cuda_graphs.timing.WARM_UP + 1)
    assert world.replays == 4 and graphed.graphs == {(3, 4): "sparse", (2, 4): "sparse"}


def test_an_output_stays_as_it_is_when_the_next_call_comes(world):
    graphed = Graphed(Model(world))
    first = graphed(torch.randn(2, 4))
    kept = first.clone()
    (recorded,) = graphed._graphs.values()
    with torch.inference_mode():
        recorded.outputs.fill_(7)
    assert torch.equal(first, kept) and (graphed(torch.randn(2, 4)) == 7).all()


def test_the_input_is_copied_into_the_graphs_own(world):
    graphed = Graphed(Model(world))
    graphed(torch.zeros(2, 4))
    x = torch.randn(2, 4)
    graphed(x)
    (recorded,) = graphed._graphs.values()
    assert torch.equal(recorded.images, x) and recorded.images.data_ptr() != x.data_ptr()


def test_a_call_waits_on_the_gpu_for_the_last_ones_output(world):
    """Two threads with streams of their own share the graph's input and output."""
    graphed = Graphed(Model(world))
    for _ in range(2):
        graphed(torch.randn(2, 4))
    assert world.waited == [graphed._done] * 2 and graphed._done.at == world.now > 0


@pytest.mark.parametrize("why", ["hook", "gradient of x", "gradient of a weight", "keyword", "subclass"])
def test_what_a_graph_cannot_do_runs_eagerly(world, why):
    model = Model(world)
    graphed, x, more = Graphed(model), torch.randn(2, 4), {}
    graphed(x)
    seen, before = [], model.calls
    if why == "hook":
        model.head.register_forward_hook(lambda *_: seen.append(1))
    elif why == "gradient of x":
        x.requires_grad_()
    elif why == "gradient of a weight":
        model.requires_grad_(True)
    elif why == "keyword":
        more = {"scale": 2.0}
    else:
        x = torch.randn(2, 4).as_subclass(type("Mine", (torch.Tensor,), {}))
    out = graphed(x, **more)
    assert model.calls == before + 1 and world.replays == 1 and out.requires_grad == why.startswith("gradient")
    assert bool(seen) == (why == "hook")


@pytest.mark.parametrize("dense_ms, taken", [(0.9, "dense"), (0.99, "sparse"), (3.0, "sparse")])
def test_the_dense_model_stands_in_where_its_graph_is_faster(world, monkeypatch, dense_ms, taken):
    dense = Model(world)
    dense.ms = dense_ms
    monkeypatch.setattr(graft, "dense_twin", lambda model: dense)
    sparse = Model(world)
    allowed, fixed = Graphed(sparse, dense_allowed=True), Graphed(sparse)
    for graphed in (allowed, fixed):
        graphed(torch.randn(2, 4))
    assert allowed.graphs == {(2, 4): taken} and fixed.graphs == {(2, 4): "sparse"}


def test_the_last_used_shapes_are_kept(world, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST", 2)
    graphed = Graphed(Model(world))
    for n in (1, 2, 1, 3, 1):
        graphed(torch.randn(n, 4))
    assert list(graphed.graphs) == [(3, 4), (1, 4)] and world.captured == 3


def test_graphs_go_with_the_tensors_that_they_read(world):
    graphed = Graphed(Model(world))
    graphed(torch.randn(2, 4))
    with torch.no_grad():
        graphed.module.head.weight.zero_()  # in place: the graph reads it
    assert len(graphed.graphs) == 1
    graphed.double()
    assert not graphed.graphs and graphed(torch.randn(2, 4).double()).dtype == torch.float64


def test_it_shows_what_the_model_has_and_is_neither_trained_copied_nor_pickled(world):
    graphed = Graphed(Model(world))
    assert graphed.num_classes == 3 and graphed.eval() is graphed and not graphed.training
    with pytest.raises(AttributeError, match="nothing"):
        _ = graphed.nothing
    with pytest.raises(UsageError, match="for inference"):
        graphed.train()
    for refused in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="its `module`"):
            refused(graphed)


def test_a_cpu_is_refused_by_name():
    with pytest.raises(UsageError, match="graph: CUDA graphs need device cuda, not cpu") as error:
        Graphed(nn.Linear(2, 2))
    assert "--device" in error.value.for_command_line()
