"""Several schedules over one backbone: each computes what a model grafted for it alone does, in any order."""

import copy
import pickle

import pytest
import torch

from helpers.families import build, draw_importance, images
from sparsify.config import SparsityConfig, Tokens
from sparsify.errors import UsageError
from sparsify.nn import graft, hosts, schedules
from sparsify.nn.attention import DenseAttention, attention_modules, sparse_modules

BASE = SparsityConfig(keep=0.3, rank=6, cells=(2, 2))
PLANS = {
    0.8: dict(keep=("dense", 0.5, 0.4), rank=((4, 8, 4), (4, 8, 4), (2, 2, 2)), cells=((2, 2), (3, 2), (2, 2))),
    0.5: dict(keep=(0.2, "dense", (0.1, 0.2, 0.3)), rank=((1, 2, 3), (6, 6, 6), (12, 4, 8))),
    0.3: dict(keep=(0.2, 0.2, "dense"), rank=4, tokens=Tokens(keep=(1.0, 0.5, 0.0))),
}
SCHEDULES = {budget: SparsityConfig(**{**BASE.model_dump(), **plan}) for budget, plan in PLANS.items()}


def with_schedules(dense, budget=0.8, configs=SCHEDULES):
    """A model with all schedules, its predictors and importances drawn."""
    model = graft.graft(copy.deepcopy(dense), configs[budget], others=tuple(configs.values()))
    schedules.offer(model, configs, budget)
    torch.manual_seed(5)
    for module in attention_modules(model).values():
        for parameter in module.predictor.parameters():
            torch.nn.init.normal_(parameter)
    return draw_importance(model)


def alone(dense, config, model):
    """The dense model grafted by one configuration, with the predictors and importances of `model`."""
    made = graft.graft(copy.deepcopy(dense), config)
    state = model.state_dict()
    made.load_state_dict({k: state[k][(..., *map(slice, v.shape[-1:]))] for k, v in made.state_dict().items()})
    return made


@pytest.mark.parametrize("family", ["deit", "eva02", "beit", "vit-avg-pool"])
@pytest.mark.parametrize("folded", [True, False])
@torch.no_grad()
def test_every_budget_equals_a_model_of_its_own(family, folded):
    if family == "vit-avg-pool":  # without a prefix some token must stay
        configs = {b: c.model_copy(update={"tokens": None}) for b, c in SCHEDULES.items()}
    else:
        configs = SCHEDULES
    configs = {b: c.model_copy(update={"fold": folded}) for b, c in configs.items()}
    dense = build(family, depth=3)
    model, x = with_schedules(dense, configs=configs), images(dense)
    names = set(model.state_dict())
    for budget in (0.5, 0.3, 0.8, 0.3, 1.0, 0.5):
        model.set_budget(budget)
        expected = alone(dense, configs[budget], model) if budget in configs else dense
        torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0 if budget in configs else 2e-5)
        assert set(model.state_dict()) == names and model.set_budget.budget == budget
    assert model.set_budget.budgets == (1.0, 0.8, 0.5, 0.3)


@torch.no_grad()
def test_a_copy_sets_its_own_budget():
    model = with_schedules(build("deit", depth=3))
    x = images(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = model(x)
        copied.set_budget(0.5)
        assert torch.equal(model(x), before) and not torch.equal(copied(x), before)
        assert (model.set_budget.budget, copied.set_budget.budget) == (0.8, 0.5)
    applied = schedules.applied(model, SCHEDULES[0.5])
    assert torch.equal(applied(x), copied(x)) and not hasattr(applied, "set_budget")
    assert not hasattr(graft.dense_twin(model), "set_budget")


@pytest.mark.parametrize("family", ["deit", "eva02"])
@torch.no_grad()
def test_another_image_size_is_of_all_budgets(family):
    dense = build(family, depth=3)
    one, two = with_schedules(dense), with_schedules(dense)
    side = 9 * hosts.stride(dense)[0]
    graft.resize(one, side)
    one.set_budget(0.5)
    two.set_budget(0.5)
    graft.resize(two, side)
    assert torch.equal(one(images(one)), two(images(two)))
    resting = one.blocks[1].attn
    assert isinstance(resting, DenseAttention) and resting.predictor is not None


def test_what_nobody_needs_is_forgotten():
    config = SCHEDULES[0.5].model_copy(update={"fold": False})
    model = with_schedules(
        build("deit", depth=3), configs={b: c.model_copy(update={"fold": False}) for b, c in SCHEDULES.items()}
    )
    assert [m.predictor.a_q.shape[-1] for m in attention_modules(model).values()] == [4, 8, 12]
    schedules.apply(model, config)
    widths = [m.predictor and m.predictor.a_q.shape[-1] for m in attention_modules(model).values()]
    assert widths == [3, None, 12] and len(sparse_modules(model)) == 2
    with pytest.raises(UsageError, match="block 2 has no predictor"):
        schedules.apply(model, SCHEDULES[0.8].model_copy(update={"fold": False}))


def test_a_budget_that_is_not_there_is_refused_and_changes_nothing():
    model = with_schedules(build("deit", depth=3))
    with pytest.raises(UsageError, match=r"0\.6: this file has schedules for 0.8, 0.5, 0.3; 1 is dense"):
        model.set_budget(0.6)
    assert model.set_budget.budget == 0.8


def test_predictors_that_rest_do_not_train():
    model = graft.freeze_predictors(with_schedules(build("eva02", depth=3)))
    trains = [name for name, p in model.named_parameters() if p.requires_grad and ".predictor." in name]
    assert not trains and any(".predictor." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tail="mean"), "differ in keep, rank, cells, tokens alone"),
        (dict(tokens=Tokens(way="evit")), "remove tokens in one way"),
    ],
)
def test_schedules_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        schedules.check_alike([*SCHEDULES.values(), BASE.model_copy(update=changes)])


@pytest.mark.parametrize("predictor", ["head-lowrank", "token-lowrank"])
@torch.no_grad()
def test_dense_attention_over_the_tokens_present_is_what_a_configuration_of_it_gives(predictor):
    dense = build("deit", depth=3)
    config = BASE.model_copy(update={"tokens": Tokens(keep=(0.7, 1.0, 1.0)), "predictor": predictor})
    model, x = draw_importance(graft.graft(copy.deepcopy(dense), config)), images(dense)
    found = schedules.densely(model)
    torch.testing.assert_close(found(x), schedules.applied(model, config.model_copy(update={"keep": "dense"}))(x))
    assert not sparse_modules(found) and len(sparse_modules(model)) == 3
    assert not torch.allclose(found(x), graft.dense_twin(model)(x), atol=1e-3)  # tokens are removed
    assert not torch.allclose(found(x), model(x), atol=1e-6)
    owned = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in owned for parameter in found.parameters())
