"""`load(..., warmup=)`: after it nothing is decided, measured or checked in the first call of a shape."""

import pytest
import torch

import sparsify
from sparsify.errors import UsageError
from sparsify.nn import guard
from sparsify.nn.adaptive import Adaptive, Rule, adaptive
from sparsify.nn.warmup import warm_up
from sparsify.ops import auto, backends
from sparsify.ops.auto import Choice, Chooser, Race
from sparsify.recipe import load_recipe

SIZE = (3, 28, 28)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file with two budgets."""
    file = tmp_path_factory.mktemp("warm") / "digits.safetensors"
    recipe = load_recipe("calibrate").override(calib_images=4)
    return sparsify.convert("digits", recipe=recipe, target_macs=(0.8, 0.4), output=file).path


@pytest.fixture
def decisions(tmp_path, monkeypatch):
    """What is decided or checked from now on; nothing is remembered on disk, and the sparse form always wins."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(backends, "not_built", lambda: "not here")
    made = []

    def race(runs, clock, *rest):
        made.append(tuple(runs))
        return Race({name: 1.0 if name in ("cpu", "reference", "decided") else 9.0 for name in runs}, 7, 1.0)

    decide, check = Chooser._decide, guard._check
    monkeypatch.setattr(auto, "race", race)
    monkeypatch.setattr(Chooser, "_decide", lambda *call: made.append("decide") or decide(*call))
    monkeypatch.setattr(guard, "_check", lambda *call: made.append("check") or check(*call))
    return made


@torch.inference_mode()
def called(model, decisions, *batch_sizes):
    """The decisions in calls of these batch sizes."""
    decisions.clear()
    for batch in batch_sizes:
        model(torch.zeros(batch, *SIZE))
    return len(decisions)


def test_the_first_call_of_a_warm_shape_decides_nothing(path, decisions):
    model = sparsify.load(path, warmup=[(1, *SIZE), (3, *SIZE)])
    assert decisions.count("check") == 6 and len(decisions) > 12  # three budgets, two shapes
    assert called(model, decisions, 1, 3) == 0
    assert called(model, decisions, 2) > 0
    assert called(sparsify.load(path), decisions, 1) > 0  # its own checks: only the disk is shared


def test_every_budget_is_warm_and_the_one_in_use_stays(path, decisions):
    model = sparsify.load(path, budget=0.4, warmup=[(1, *SIZE)])
    assert model.set_budget.budget == 0.4
    for budget in (0.4, 0.8, 1.0):
        model.set_budget(budget)
        assert called(model, decisions, 1) == 0


def test_both_models_of_an_adaptive_one_are_warm_for_any_part_of_a_batch(path, decisions):
    model = adaptive(sparsify.load(path), Rule(0.4, 0.8, 0.5, 0.5))
    assert isinstance(model, Adaptive)
    warm_up(model, [(3, *SIZE)])
    for margin in (0.0, 0.2, 0.6, 0.9, 1.1):
        model.rule = model.rule._replace(margin=margin)
        assert called(model, decisions, 3) == 0


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_warm_model_computes_what_a_cold_one_does(path, backend, decisions):
    warm, cold = (sparsify.load(path, backend=backend, warmup=shapes) for shapes in ([(2, *SIZE)], ()))
    x = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(warm(x), cold(x))


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (0, *SIZE), (1, 1, 28, 28), SIZE, 1, (1.0, *SIZE), "1328"])
def test_a_shape_that_the_model_does_not_take_is_one_line(shape, path, monkeypatch):
    monkeypatch.setattr(Chooser, "choose", lambda *call: Choice("sdpa", {}, 0, ""))
    with pytest.raises(UsageError, match=r"^warmup [^\n]*: shapes \(B, 3, 28, 28\) are expected, as in \[\(1, 3, 28"):
        sparsify.load(path, warmup=[shape])
