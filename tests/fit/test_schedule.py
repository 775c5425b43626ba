"""Schedules: costs equal the profile's MACs, the search is exact where that can be checked, targets are met."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.cli.app import main
from sparsify.config import BlockPlan, SparsityConfig, Tokens
from sparsify.errors import UsageError
from sparsify.fit.calibrate.calibrate import calibrate, fit_importance
from sparsify.fit.schedule import choose, search
from sparsify.fit.schedule import costs as costing
from sparsify.fit.schedule.costs import BlockCost
from sparsify.fit.schedule.sensitivity import Sensitivity
from sparsify.images import datasets
from sparsify.measure.profile import profile
from sparsify.models import checkpoint
from sparsify.nn import execution, graft, schedules, token_models
from sparsify.nn.attention import Execution, attention_modules
from sparsify.recipe import load_recipe

DENSE = BlockPlan(None, (4, 4), ((1, 1),))
KW = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def tiny(**more):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **KW | more).eval()
    return graft.graft(model, SparsityConfig(keep=0.5, rank=4, spread="none", cells=(2, 2)))


def sensitivity(model, config, images, keeps):
    return choose.sensitivity(model, config, images, choose.options_of(model, config, keeps))


class Linear(BlockCost):
    """A block that costs its tokens, and its keys where attention is sparse."""

    def attention(self, keep, n):
        return n * (1.0 if keep is None else keep)

    def entering(self, n):
        return n

    def leaving(self, n):
        return 2.0 * n

    def stage(self, n, m):
        return 0.0

    def last(self, n):
        return 0.5 * n


def drawn(seed, depth=3, patches=8, empty=None):
    rng = np.random.default_rng(seed)
    rise = np.sort(rng.random((depth, 6)), 1)
    tokens = np.concatenate([np.zeros((depth, 1)), rise], 1)
    keeps = np.stack([np.zeros(depth), rng.random(depth) / 10], 1)
    return Sensitivity(patches, (1.0, 0.85, 0.7, 0.5, 0.35, 0.2, 0.1), tokens, empty, {None: (), 0.5: ()}, keeps)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(0.01, 1), st.booleans(), st.sampled_from([0.0, 0.5, 3.0]))
def test_the_search_finds_the_least_damage_for_a_price(seed, price, empty, overhead):
    measured = drawn(seed, empty=0.01 if empty else None)
    costs = [Linear()] * 3
    found = search._solver(measured, costs, overhead)(price)
    levels = [*range(8, 0, -1), *([0] if empty else [])]

    def worth(s):
        return s.damage + price * (s.cost + overhead * rounds_of(s))

    best = min(
        worth(search._schedule(measured, costs, (8, a, b, c), keeps))
        for a, b, c in itertools.product(levels, repeat=3)
        if 8 >= a >= b >= c and a and b
        for keeps in itertools.product((None, 0.5), repeat=3)
        if c or keeps[2] is None
    )
    assert worth(found) == pytest.approx(best, rel=1e-6)


def rounds_of(schedule):
    return sum(0 < m < n for n, m in itertools.pairwise(schedule.counts))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(0.3, 0.95), st.floats(0.001, 1), st.floats(0.1, 4))
def test_overhead_makes_fewer_rounds_and_the_target_is_met_without_it(seed, share, price, overhead):
    measured, costs = drawn(seed, depth=6, patches=64, empty=0.01), [Linear()] * 6
    target = share * search.price(costs, [64] * 7, [None] * 6)
    few, many = (rounds_of(search._solver(measured, costs, each)(price)) for each in (overhead, 0.0))
    assert few <= many
    found = search.search(measured, costs, target, overhead)
    assert found.cost <= target


def test_a_large_merging_is_several_rounds():
    costs = costing.macs_costs(tiny(), "merge", {None: [DENSE] * 4})
    assert [costs[0].rounds(16, m) for m in (16, 14, 11, 8, 6)] == [0, 1, 2, 2, 3]
    assert costing.macs_costs(tiny(), "evit", {None: [DENSE] * 4})[0].rounds(16, 1) == 1


@given(st.lists(st.integers(1, 400), min_size=2, max_size=13), st.booleans())
def test_rates_give_the_counts_again(counts, empty):
    counts = sorted(counts, reverse=True) + [0] * empty
    rates = search.BlockSchedule(tuple(counts), (None,) * (len(counts) - 1), 0.0, 0.0).rates()
    shares = Tokens(keep=rates).shares(len(rates))
    left, found = counts[0], [counts[0]]
    for share in shares:
        left = left if share is None else min(left, int(np.ceil(share * counts[0] - 1e-9)))
        found.append(left)
    assert found == counts


@pytest.mark.parametrize("importance", ["attention", "fitted"])
@pytest.mark.parametrize("way", ["merge", "evit"])
@pytest.mark.parametrize("counts", [(16, 16, 16, 16, 16), (16, 12, 12, 7, 3), (16, 16, 9, 4, 0)])
def test_costs_are_the_profiles_macs(way, counts, importance):
    model = tiny()
    if importance == "fitted":
        fit_importance(model, lambda: [torch.randn(4, 3, 32, 32)])
    keeps = (None, 0.5, 0.25, None)
    by_head = BlockPlan((0.5, 0.2), (3, 8), ((2, 2), (1, 1)))
    options = {None: [DENSE] * 4, 0.5: [by_head] * 4, 0.25: [BlockPlan((0.25,), (4, 4), ((2, 1),))] * 4}
    config = SparsityConfig(spread="none").with_plans([options[keep][i] for i, keep in enumerate(keeps)])
    costs = costing.macs_costs(model, way, options)

    def total(c, a):
        rates = search.BlockSchedule(c, a, 0, 0).rates()
        tokens = Tokens(way=way, keep=rates, importance=importance) if len(set(c)) > 1 else None
        return profile(
            schedules.applied(model, config.model_copy(update={"tokens": tokens})), measure=False
        ).macs_sparse

    dense = profile(model, measure=False).macs_dense
    fixed = dense - search.price(costs, (16,) * 5, (None,) * 4)
    got = search.price(costs, counts, keeps) + fixed
    # the final norm, 5 C a token, is outside of the blocks: it sees fewer tokens too
    assert got == total(counts, keeps) + 5 * 32 * (16 - counts[-1])


@pytest.mark.parametrize("importance,untimed", [("fitted", "attention_importance"), ("attention", "fitted_importance")])
def test_the_importance_that_is_timed_is_the_models(importance, untimed, monkeypatch):
    model = tiny()
    execution.set_execution(model, Execution("reference"))
    if importance == "fitted":
        fit_importance(model, lambda: [torch.randn(4, 3, 32, 32)])
    monkeypatch.setattr(costing, untimed, lambda *arguments: pytest.fail("timed"))
    costs = costing.measured_costs(model, "merge", {None: [DENSE] * 4}, 1)
    assert costs[0].stage(12, 6) > 0


def test_sensitivity_leaves_the_model_as_it_was_and_sees_what_matters():
    model = tiny()
    execution.set_execution(model, Execution("reference"))
    x = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
    measured = sensitivity(model, SparsityConfig(keep=0.5, rank=4), [x], (None, 0.5, 0.25))
    with torch.no_grad():
        assert torch.equal(model(x), before)
    assert type(model).__name__ == "VisionTransformer" and not list(token_models.stages(model))
    assert measured.empty == pytest.approx(0, abs=1e-6)  # nothing reads patch rows after the last block
    assert (measured.keeps[:, 0] == 0).all() and measured.tokens[0, -1] > measured.tokens[0, 1] >= 0
    assert np.allclose(measured.tokens[-1], 0, atol=1e-6)


def test_no_classifier_no_empty_end():
    model = tiny(num_classes=0)
    execution.set_execution(model, Execution("reference"))
    measured = sensitivity(model, SparsityConfig(keep=0.5, rank=4), [torch.randn(4, 3, 32, 32)], (None, 0.5))
    assert measured.empty is None and measured.tokens[-1, -1] > 0


@pytest.mark.parametrize("target", [0.75, 0.5])
def test_target_macs_is_met_and_the_better_of_two(target):
    model = tiny()
    execution.set_execution(model, Execution("reference"))
    config = SparsityConfig(keep=0.5, rank=4, spread="none")
    x = torch.randn(8, 3, 32, 32)
    measured = sensitivity(model, config, [x], (None, 0.5))
    dense = profile(model, measure=False).macs_dense
    found = choose.for_macs(model, config, measured, target, dense)
    got = profile(schedules.applied(model, found.config), measure=False).macs_sparse / dense
    assert got <= target * 1.001 and got > target - 0.06  # 16 patches move in steps of 2 %


def test_a_target_below_the_least_is_refused():
    model = tiny()
    execution.set_execution(model, Execution("reference"))
    config = SparsityConfig(keep=0.5, rank=4, spread="none")
    measured = sensitivity(model, config, [torch.randn(2, 3, 32, 32)], (None,))
    with pytest.raises(UsageError, match="least that a schedule"):
        choose.for_macs(model, config, measured, 0.01, profile(model, measure=False).macs_dense)


def test_target_latency_aims_by_what_it_measures(monkeypatch):
    model = tiny()
    execution.set_execution(model, Execution("reference"))
    config = SparsityConfig(keep=0.5, rank=4, spread="none")
    measured = sensitivity(model, config, [torch.randn(4, 3, 32, 32)], (None, 0.5))
    said, shares = [], iter([0.9, 0.75, 0.61])

    class At:
        def __init__(self, median):
            self.median = median

    def pretended(candidates, rounds=None, device=None):
        return {"dense": At(10.0), "sparse": At(10.0 * next(shares))} if "sparse" in candidates else {"dense": At(10.0)}

    monkeypatch.setattr(choose, "interleaved", pretended)
    monkeypatch.setattr(choose, "measured_costs", lambda *_: [Linear()] * 4)
    found = choose.for_latency(model, config, measured, 0.6, say=said.append)
    assert found.share == pytest.approx(0.61) and len(said) == 3


def test_measured_costs_are_times():
    model = tiny()
    execution.set_execution(model, Execution("reference"))
    costs = costing.measured_costs(
        model, "merge", {None: [DENSE] * 4, 0.5: [BlockPlan((0.5,), (4, 4), ((2, 2),))] * 4}, 1
    )
    assert len(costs) == 4
    for n, m in ((16, 16), (16, 9), (9, 3), (3, 0)):
        assert costs[0].whole(None, n, m) > 0 and costs[0].attention(0.5, n) > 0


def convert(tmp_path, *more):
    file = tmp_path / "m.safetensors"
    with pytest.raises(SystemExit) as done:
        main(["convert", "digits", "-o", str(file), "--calib-images", "16", "--quiet", "--force", *more])
    assert done.value.code == 0
    return file


def test_convert_for_a_target_writes_a_recipe_that_gives_the_model_again(tmp_path):
    file = convert(tmp_path, "--target-macs", "0.6")
    model, header = checkpoint.load(file), checkpoint.read_header(file)
    p = profile(model, measure=False)
    assert 0.54 < p.macs_sparse / p.macs_dense <= 0.612 and header.config.tokens is not None
    recipe = tmp_path / "m.recipe.yaml"
    assert load_recipe(str(recipe)).sparsity.tokens == header.config.tokens
    again = tmp_path / "again"
    again.mkdir()
    other = checkpoint.load(convert(again, "--recipe", str(recipe)))
    assert profile(other, measure=False).macs_sparse == p.macs_sparse
    # Not on noise: the two fold different blocks, the importance differs by rounding, and tokens of noise are nearly tied.
    transform = datasets.transform(datasets.data_config(model))
    x, _ = next(iter(datasets.labelled("digits", 10, transform, batch_size=64)))
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-3, atol=1e-3)


def test_token_keep_alone_names_the_blocks_in_the_file(tmp_path):
    header = checkpoint.read_header(convert(tmp_path, "--token-keep", "0.7"))  # 4 blocks
    assert header.config.tokens == Tokens(keep=0.7, stages=(2, 3, 4))


def test_token_keep_alone_leaves_attention_dense(tmp_path):
    header = checkpoint.read_header(convert(tmp_path, "--token-keep", "0.7", "--token-stages", "2,3"))
    assert header.config.keep == "dense" and header.config.tokens == Tokens(keep=0.7, stages=(2, 3))
    header = checkpoint.read_header(
        convert(tmp_path, "--token-keep", "0.7", "--token-stages", "2", "--token-way", "evit", "--keep", "0.2")
    )
    assert 0.1 < header.config.keep_of(0) < 0.5 and header.config.tokens == Tokens(way="evit", keep=0.7, stages=(2,))


@pytest.mark.parametrize("importance", ["fitted", "attention"])
def test_the_importance_asked_for_is_what_the_file_goes_by(importance, tmp_path):
    for more in (["--token-keep", "0.7", "--token-stages", "2"], ["--target-macs", "0.8", "--calib-images", "16"]):
        path = convert(tmp_path, "--token-importance", importance, *more, "--force")
        assert checkpoint.read_header(path).config.tokens.importance == importance
        modules = attention_modules(checkpoint.load(path)).values()
        assert any(m.importance is not None and bool(m.importance.any()) for m in modules) == (importance == "fitted")


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--token-keep", "1.2"], "token"),
        (["--token-keep", "0"], "token"),
        (["--token-keep", "nan"], "token"),
        (["--token-keep", "half"], "--token-keep half"),
        (["--token-keep", "0.5,0.5"], "rates"),
        (["--token-keep", "0.5", "--token-stages", "99"], "expected different blocks"),
        (["--token-keep", "0.5", "--token-stages", "x"], "--token-stages x"),
        (["--token-keep", "0.5", "--token-way", "magic"], "way"),
        (["--token-keep", "0.5", "--token-importance", "magic"], "importance"),
        (["--target-macs", "0"], "target"),
        (["--target-macs", "1.5"], "target"),
        (["--target-macs", "0.5", "--target-latency", "0.5"], "either"),
        (["--target-macs", "0.5", "--token-keep", "0.5"], "leave one of them out"),
        (["--keep", "dens"], "--keep dens"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["convert", "digits", "-o", str(tmp_path / "m.safetensors"), *arguments])
    error = capsys.readouterr().err
    assert done.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", [0.8, 0.6])
def test_heads_of_all_blocks_share_what_a_schedule_gives_attention(target):
    """As many MACs as before or what the target leaves over, counted by `profile`; predicted errors do not rise."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **KW).eval()
    with torch.no_grad():
        for module in (*(block.attn.qkv for block in model.blocks), model.head):
            module.weight.mul_(30)  # as far from uniform as a trained model's
    x = torch.randn(8, 3, 32, 32)
    found = calibrate(model, SparsityConfig(keep=0.3, rank=4), lambda: [x], keeps=(0.3, 0.6))
    fit_importance(found.model, lambda: [x])
    dense, options = profile(model, measure=False).macs_dense, found.budgets.options((None, 0.3, 0.6))
    measured = choose.sensitivity(found.model, found.config, [x], options)
    alone = choose.for_macs(found.model, found.config, measured, target, dense)
    shared = choose.for_macs(found.model, found.config, replace(measured, budgets=found.budgets), target, dense)
    assert shared.schedule.counts == alone.schedule.counts and shared.share <= max(alone.share, target) + 1e-9
    macs = {each.share: profile(schedules.applied(found.model, each.config), measure=False) for each in (alone, shared)}
    counted = macs[shared.share].macs_sparse - macs[alone.share].macs_sparse
    assert counted == pytest.approx((shared.share - alone.share) * dense, abs=1)
    plans = [each.config.resolved(found.budgets.shape) for each in (alone, shared)]
    sparse = [i for i, plan in enumerate(plans[0]) if plan.keeps is not None]
    errors = [sum(damage(found.budgets.blocks[i], each[i]) for i in sparse) for each in plans]
    assert sparse and errors[1] <= errors[0] + 1e-12 and plans[0] != plans[1]
    for i in sparse:
        assert shared.schedule.keeps[i] == pytest.approx(sum(plans[1][i].keeps) / 2, abs=1e-3)


def damage(block, plan):
    """Predicted of the heads of a block by one of its plans."""
    settings = zip(plan.ranks, plan.keeps, plan.cells, strict=True)
    return sum(float(block.errors[(h, *block.settings.nearest(*setting))]) for h, setting in enumerate(settings))


def test_without_budgets_a_schedule_keeps_the_plans_of_its_keeps():
    measured = drawn(0)
    schedule = search.BlockSchedule((8, 8, 8, 8), (None, None, None), 1.0, 0.0)
    options = {None: (DENSE,) * 3}
    assert choose.together(replace(measured, options=options), [], schedule, 2.0) == (schedule, [DENSE] * 3)
