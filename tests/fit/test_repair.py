"""Least squares before the first stage: whom they can treat, and that they bring a sparse model nearer to the dense one."""

import copy

import pytest
import torch

from helpers import families
from helpers.small_runs import recipe
from sparsify.config import SparsityConfig
from sparsify.errors import UsageError
from sparsify.fit.calibrate.repair import repair, unrepairable
from sparsify.fit.finetune.plan import TrainingData, make_plan
from sparsify.models.digits import network
from sparsify.nn import graft
from sparsify.processes import Compute
from sparsify.recipe import Repair

OTHERS = [f for f in families.FAMILIES if f.startswith(("eva", "beit", "naflex", "dinov3", "rope", "perception"))]
REPAIRABLE = [f for f in families.FAMILIES if f not in OTHERS and f != "res-post-norm"]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_who_can_be_treated(family):
    assert (unrepairable(families.build(family)) == "") == (family in REPAIRABLE)


@pytest.mark.parametrize("family", REPAIRABLE)
def test_the_last_blocks_output_comes_nearer_to_the_dense_models(family):
    dense = families.build(family)
    sparse = graft.graft(copy.deepcopy(dense), SparsityConfig(keep=0.2, rank=4, spread="none", tail="none"))
    x = families.images(dense, 8)

    def error() -> float:
        found = [m.forward_features(x) for m in (dense, sparse)]
        return float((found[1] - found[0]).square().sum())

    with torch.no_grad():
        before = error()
        repair(sparse, dense, [x[:5], x[5:]], Repair(ridge=1e-4))
        assert 0 < error() < 0.9 * before


def test_it_is_left_out_where_it_cannot_be_done(monkeypatch):
    plain, post = network.build(), network.build()
    monkeypatch.setattr("sparsify.fit.finetune.plan.unrepairable", lambda model: "why" if model is post else "")
    both, alone = recipe({}, repair={"images": 4}), recipe(repair={"images": 4})

    def plan(model, chosen):
        return make_plan(model, chosen, TrainingData("digits"), Compute(), "")

    found = [plan(model, both) for model in (plain, post)]
    assert [(p.unrepaired, p.repair is None) for p in found] == [("", False), ("why", True)]
    assert plan(post, recipe({})).unrepaired == ""  # nobody asked for it
    assert plan(plain, alone).repair is not None
    with pytest.raises(UsageError, match="^repair: why, and the recipe has no stages"):
        plan(post, alone)
