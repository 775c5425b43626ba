"""Budgets of the heads: what a keep costs is not exceeded, goes where it brings most, and equals what profile counts."""

import itertools
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.families import build, images
from sparsify.config import BlockPlan, SparsityConfig
from sparsify.errors import UsageError
from sparsify.fit.calibrate import budgets, head_errors
from sparsify.fit.calibrate.budgets import BlockErrors, Settings
from sparsify.fit.calibrate.calibrate import calibrate
from sparsify.fit.schedule import head_costs
from sparsify.measure.profile import profile
from sparsify.nn import graft, schedules
from sparsify.nn.attention import sparse_modules
from sparsify.ops.spec import budget
from sparsify.reports import header


def fitted(model=None, keeps=(), **settings):
    model = model or build("deit")
    x = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    return calibrate(model, SparsityConfig(**{"rank": 8, **settings}), lambda: x.split(2), keeps=keeps)


def cost(config, **more):
    model = graft.graft(build("deit"), config)
    return profile(model, measure=False).mhsa_macs_sparse


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0.0, 1.2))
def test_the_choice_is_near_the_best_and_within_the_budget(seed, items, share):
    g = torch.Generator().manual_seed(seed)
    errors, costs = (
        torch.rand(items, 5, generator=g, dtype=torch.float64),
        torch.rand(items, 5, generator=g).double() + 0.1,
    )
    total = float(costs.min(1).values.sum() * (1 - share) + costs.max(1).values.sum() * share)
    options, rows = budgets.choose(errors, costs, total), torch.arange(items)
    assert float(costs[rows, options].sum()) <= total + 1e-9
    best = min(
        float(errors[rows, torch.tensor(each)].sum())
        for each in itertools.product(range(5), repeat=items)
        if float(costs[rows, torch.tensor(each)].sum()) <= total + 1e-12
    )
    assert float(errors[rows, options].sum()) <= best + float(errors.max())  # one price misses at most one step


def test_a_budget_that_nothing_meets_takes_the_cheapest():
    errors, costs = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).double(), torch.tensor([[1.0, 2.0], [1.0, 2.0]]).double()
    assert budgets.choose(errors, costs, 1.5).tolist() == [0, 0]
    assert budgets.choose(errors, costs, 3.0).tolist() in ([0, 1], [1, 0])
    assert budgets.choose(errors, costs, 4.0).tolist() == [1, 1]


def test_what_is_spent_goes_to_the_head_that_needs_it():
    """By hand: a head that loses nothing pays for the other."""
    settings = Settings((4, 8), (0.1, 0.2), ((1, 1),))
    costs = torch.tensor([[[1.0], [2.0]], [[2.0], [3.0]]]).double()
    errors = torch.stack([torch.zeros(2, 2, 1), torch.tensor([[[9.0], [4.0]], [[8.0], [1.0]]])]).double()
    (plan,) = budgets.spend([BlockErrors(settings, errors, costs)], 4.0)
    assert plan == BlockPlan((0.1, 0.2), (4, 8), ((1, 1), (1, 1)))


@pytest.mark.parametrize("spread", ["rank", "all"])
@pytest.mark.parametrize("keep", [0.1, 0.3])
@pytest.mark.parametrize("fold", [True, False])
def test_the_model_costs_no_more_than_the_keep_everywhere(spread, keep, fold):
    found = fitted(keep=keep, spread=spread, fold=fold)
    asked, spent = (SparsityConfig(keep=keep, rank=8, spread="none", fold=fold), found.config)
    assert 0.8 * cost(asked) < cost(spent) <= cost(asked)
    plans = spent.resolved(found.budgets.shape)
    assert all(len(plan.ranks) == 3 for plan in plans)
    keeps = {k for plan in plans for k in plan.keeps}
    assert (keeps == {keep}) == (spread == "rank")
    assert SparsityConfig.model_validate(spent.model_dump(mode="json")) == spent


def test_the_reports_macs_are_those_that_were_spent():
    found = fitted(keep=0.2, fold=True)
    shape = found.budgets.shape
    total = sum(found.budgets.cost(i, plan) for i, plan in enumerate(found.budgets.uniform(0.2)))
    assert total == cost(SparsityConfig(keep=0.2, rank=8, spread="none")) and shape.heads == 3


@pytest.mark.parametrize(
    "changes",
    [
        dict(spread="none"), dict(rank=(4, 8)), dict(keep=((0.1, 0.2, 0.3), (0.1, 0.1, 0.1))), dict(keep=1.0),
        dict(predictor="token-lowrank"),
    ],
)  # fmt: skip
def test_what_is_said_for_every_head_stays(changes):
    found = fitted(**{"keep": 0.2} | changes)
    assert not found.budgets.blocks or "keep" in changes
    assert found.config.keep == changes.get("keep", 0.2)


def test_cells_that_are_said_stay_and_keeps_move():
    config = fitted(keep=0.2, cells=(2, 3)).config
    assert config.cells == (2, 3) or {c for block in config.cells for c in block} == {(2, 3)}
    assert len({k for block in config.keep for k in block}) > 1


def test_keep_1_and_dense_blocks_stay_beside_a_budget():
    found = fitted(keep=("dense", 0.2))
    assert found.config.keep[0] == "dense" and len(found.config.keep[1]) == 3
    model = fitted(keep=1.0).model
    x = images(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), graft.dense_twin(model)(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fold", [True, False])
def test_other_keeps_are_spent_from_the_same_errors(fold):
    """What a calibration for several keeps gives for one of them is what one for that keep alone gives."""
    several = fitted(keep=0.1, keeps=(0.3,), fold=fold)
    other = several.budgets.model(0.3)
    assert cost(other) <= cost(SparsityConfig(keep=0.3, rank=8, spread="none", fold=fold))
    x = images(several.model)
    plans = several.budgets.options((None, 0.3))
    assert all(plan.keeps is None for plan in plans[None])
    applied = schedules.applied(several.model, other)
    for module, plan in zip(sparse_modules(applied).values(), other.resolved(several.budgets.shape), strict=True):
        assert module.sparsity.keeps == plan.keeps and module.predictor.ranks == plan.ranks
        assert fold or module.predictor.a_q.shape[-1] == max(plan.ranks)
    with torch.inference_mode():
        assert torch.isfinite(applied(x)).all()
        again = schedules.applied(applied, other)
        torch.testing.assert_close(again(x), applied(x))


def test_settings_surround_what_is_asked():
    config = SparsityConfig(keep=0.1)
    plan = BlockPlan((0.1,), (16, 16), ((4, 3),))
    found = budgets.settings(config, [plan], 197, 64)
    assert 16 in found.ranks and 0.1 in found.keeps and (4, 3) in found.cells
    assert found.nearest(16, 0.1, (4, 3)) == (found.ranks.index(16), found.keeps.index(0.1), found.cells.index((4, 3)))
    assert min(found.ranks) == 4 and max(found.ranks) <= 64 and min(found.keeps) < 0.03 and max(found.keeps) > 0.3
    assert budgets.settings(config.model_copy(update={"spread": "rank"}), [plan], 197, 64).shape[1:] == (1, 1)


@pytest.mark.parametrize(("before", "now"), [(True, "rank"), (False, "none")])
def test_files_of_the_first_version_say_spread_rank(before, now):
    tree = SparsityConfig().model_dump(mode="json") | {"spread_rank": before}
    del tree["spread"]
    assert SparsityConfig.model_validate(tree).spread == now


@pytest.mark.parametrize(
    ("field", "value"),
    [("keep", ((0.1, 0.2),) * 2), ("cells", (((1, 1), (2, 2)),) * 2), ("rank", ((4, 8),) * 2)],
)
def test_lists_by_head_must_fit_the_heads(field, value):
    with pytest.raises(UsageError, match=f"{field} lists 2 values for a block, but it has 3 heads: give one each"):
        graft.graft(build("deit"), SparsityConfig(**{field: value}))


def test_time_prices_what_takes_long(monkeypatch):
    """By hand: a key takes three times as long as its MACs say, so heads keep fewer and score by more coordinates."""
    found = fitted(keep=0.3, rank=8, keeps=(0.3,))
    shape = found.budgets.shape

    def pretended(runs, rounds, device):
        def ms(at):
            settings = found.budgets.blocks[0].settings
            keys, cells = budget(settings.keeps[at[1]], 37), math.prod(settings.cells[at[2]])
            return 1 + settings.ranks[at[0]] * 0.01 + keys * 0.3 + cells * 0.1

        assert all(isinstance(run(), torch.Tensor) for run in runs.values())
        return {at: types.SimpleNamespace(median=ms(at) * 2 * shape.heads) for at in runs}

    monkeypatch.setattr(head_costs, "interleaved", pretended)
    priced = head_costs.timed(found.model, found.budgets, 2)
    block = priced.blocks[0]
    for at in itertools.product(*map(range, block.settings.shape)):
        r, keep, cells = (values[i] for values, i in zip(block.settings, at, strict=True))
        right = 1 + r * 0.01 + budget(keep, 37) * 0.3 + math.prod(cells) * 0.1
        assert float(block.costs[at]) == pytest.approx(right, rel=1e-6)
    before, now = (found.budgets.options((0.3,))[0.3], priced.options((0.3,))[0.3])
    mean = [sum(map(sum, (plan.keeps for plan in plans))) for plans in (before, now)]
    assert mean[1] < mean[0]
    assert sum(sum(p.ranks) for p in now) > sum(sum(p.ranks) for p in before)


@pytest.mark.parametrize("family", ["dinov2", "naflexvit", "beit"])
def test_every_block_counts_where_all_tokens_may_be_read(family):
    """Without a classifier the patch rows of the last block are features; a cls head reads none of them."""
    for classes in (0, 5):
        model = build(family)
        model.reset_classifier(classes)
        x = images(model, 4)
        found = calibrate(model, SparsityConfig(keep=0.2, rank=8), lambda x=x: [x])
        reads_patches = classes == 0 or model.global_pool != "token"
        first, last = (float(found.budgets.blocks[i].errors.max()) for i in (0, 1))
        assert (last > 1e-3 * first) == reads_patches


def test_more_never_counts_as_worse():
    errors = torch.tensor([[[[5.0], [7.0]], [[6.0], [1.0]]]]).double()  # one head, two ranks, two keeps, one grid
    block = BlockErrors(Settings((4, 8), (0.1, 0.2), ((1, 1),)), errors, torch.ones(2, 2, 1).double())
    assert block.ordered().errors.flatten().tolist() == [7.0, 7.0, 6.0, 1.0]


def test_a_distance_below_zero_is_none(monkeypatch):
    """KL of outputs that do not differ is a rounding error of either sign; a negative price of errors has no solution."""
    monkeypatch.setattr(head_errors, "distance", lambda *_: -1e-12)
    found = fitted(keep=0.2)
    assert all(float(block.errors.abs().max()) == 0 for block in found.budgets.blocks.values())


@pytest.mark.parametrize(("tokens", "images"), [(37 * 24, 6), (37 * 5, 5), (37, 4)])
def test_blocks_are_weighed_by_a_number_of_tokens_but_by_four_images(monkeypatch, tokens, images):
    seen, right = [], head_errors._distances
    monkeypatch.setattr(head_errors, "WEIGHED", tokens)
    monkeypatch.setattr(head_errors, "_distances", lambda t, x, *more: seen.append(len(x)) or right(t, x, *more))
    model, x = build("deit"), torch.randn(6, 3, 96, 96)
    calibrate(model, SparsityConfig(keep=0.2, rank=8), lambda: x.split(2))
    assert seen == [images]


def test_what_heads_have_is_said_in_one_line():
    config = SparsityConfig(keep=("dense", (0.1, 0.3)), rank=((8, 8), (4, 12)), cells=((2, 2), ((1, 1), (3, 3))))
    assert header.by_head(config) == "keep 0.2 (0.1 to 0.3), rank 8 (4 to 12), cells 5 (1 to 9)"
    assert header.by_head(SparsityConfig(keep=0.1)) == ""
    facts = dict(header.settings(config))
    assert facts["keep, share of keys"] == "0.2 on average, 0.1 to 0.3 by head; layers dense, 0.2"
    assert facts["tail"] == "clusters, 4.67 cells on average, 1 to 9 by head"
