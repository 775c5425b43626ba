"""`load(..., graph=True)`, by a pretended `torch.cuda` over tensors of the CPU."""

import pytest
import torch

import sparsify
from helpers.fake_gpu import PretendedCuda
from sparsify.errors import UsageError
from sparsify.nn import cuda_graphs
from sparsify.nn.attention import attention_modules
from sparsify.recipe import load_recipe

SIZE = (3, 28, 28)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file with two budgets."""
    file = tmp_path_factory.mktemp("graph") / "digits.safetensors"
    recipe = load_recipe("calibrate").override(calib_images=4)
    return sparsify.convert("digits", recipe=recipe, target_macs=(0.8, 0.4), output=file).path


@pytest.fixture
def world(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda_graphs, "check", lambda device: None)
    return PretendedCuda(monkeypatch)


def test_a_graph_for_every_shape_and_budget_and_warmup_captures_them(path, world):
    model = sparsify.load(path, graph=True, warmup=[(2, *SIZE)])
    captured = world.captured
    assert len(model.graphs) == 1 and len(model._graphs) == 3  # budgets 1, 0.8 and 0.4 of one shape
    x = torch.randn(2, *SIZE)
    with torch.inference_mode():
        for budget in (0.4, 1, 0.8):
            model.set_budget(budget)
            assert model(x).shape == (2, 10)
        assert world.captured == captured  # nothing was left to do
        model(torch.randn(3, *SIZE))
    assert world.captured > captured and set(model.graphs) == {(2, *SIZE), (3, *SIZE)}


def test_decisions_are_those_of_graphs_and_the_model_can_be_saved_and_measured(path, world, tmp_path):
    model = sparsify.load(path, graph=True)
    assert all(module.execution.graph for module in attention_modules(model.module).values())
    eager = sparsify.load(path)
    assert not any(module.execution.graph for module in attention_modules(eager).values())
    sparsify.save(model, tmp_path / "again.safetensors", like=path)
    same = sparsify.load(tmp_path / "again.safetensors").state_dict()
    assert all(torch.equal(t, same[name]) for name, t in eager.state_dict().items())
    found = sparsify.profile(model, measure=False)
    assert found.macs_sparse == sparsify.profile(eager, measure=False).macs_sparse


def test_where_a_gradient_may_be_needed_the_model_itself_computes(path, world):
    model, x = sparsify.load(path, graph=True), torch.randn(2, *SIZE)
    assert model(x).requires_grad and not model.graphs
    with torch.no_grad():
        assert torch.is_tensor(model(x)) and model.graphs


def test_other_devices_and_adaptive_inference_are_refused_by_name(path, monkeypatch):
    with pytest.raises(UsageError, match="graph: CUDA graphs need device cuda, not cpu"):
        sparsify.load(path, graph=True)
    monkeypatch.setattr(cuda_graphs, "check", lambda device: None)
    with pytest.raises(UsageError, match="graph replays one schedule"):
        sparsify.load(path, graph=True, adaptive=0.5)
