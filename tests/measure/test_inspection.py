"""What `show` is told of a model: claims held against slow, direct computations."""

import copy

import pytest
import torch

from helpers.families import build, grafted, images
from sparsify.config import SparsityConfig
from sparsify.errors import SparsifyError, UsageError
from sparsify.measure import inspection
from sparsify.nn import attention, graft, observe

KINDS = {
    "deit": ("deit", {}),
    "no cls, tiles": ("vit-avg-pool", dict(granularity="tile", tile=(2, 2))),
    "registers, token-lowrank": ("dinov2-registers", dict(predictor="token-lowrank", rank=5)),
    "merged": ("deit-distilled", dict(tokens=dict(keep=0.5, stages=(1,)), keep=0.3)),
    "evit": ("deit", dict(tokens=dict(way="evit", keep=0.5, stages=(1,)), keep=(0.3, "dense"))),
    "evit-fused": ("dinov2-registers", dict(tokens=dict(way="evit-fused", keep=0.5, stages=(1,)))),
}


def original(family, model):
    return build(family, patches=None, img_size=model.patch_embed.img_size)


def softmax_rows(q, k, scale, size):
    """[H, N, N], one row at a time, in float64."""
    H, N, _ = q.shape
    rows = torch.zeros(H, N, N, dtype=torch.float64)
    for h in range(H):
        for i in range(N):
            e = [float(size[j]) * torch.exp((q[h, i].double() @ k[h, j].double()) * scale) for j in range(N)]
            rows[h, i] = torch.stack(e) / sum(e)
    return rows


def seen(model, x):
    found = []
    with torch.inference_mode(), observe.watching_calls(model, lambda block, *call: found.append(call)):
        model.forward_features(x, full_grid=True) if hasattr(model, "full_grid") else model.forward_features(x)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_kept_mass_is_what_a_direct_computation_gives(kind):
    family, how = KINDS[kind]
    model = grafted(family, patches=(3, 4), **how)
    x = images(model, 1)
    every = tuple(range(12))
    found = inspection.inspect(model, x[0], every)
    P = len(found.prefix)
    assert found.reference == inspection.OWN and [layer.block for layer in found.layers] == [0, 1]
    for layer, (module, q, k, _, tokens) in zip(found.layers, seen(model, x), strict=True):
        N = q.shape[2]
        size = torch.ones(N) if tokens is None or tokens.size is None else tokens.size[0]
        true = softmax_rows(q[0], k[0], module.scale, size)
        at = {int(row): query for query, row in enumerate(layer.rows) if row >= 0}  # every token has a patch in it
        assert sorted(at) == list(range(P, N)) and layer.tokens == N
        for h in range(found.heads):
            shares = [float(true[h, row, layer.kept[h, query]].sum()) for row, query in at.items()]
            assert float(layer.mass[h]) == pytest.approx(sum(shares) / len(shares), abs=1e-5)
            best = [float(true[h, row].sort(descending=True).values[: layer.budgets[h]].sum()) for row in at]
            assert float(layer.best[h]) == pytest.approx(sum(best) / len(best), abs=1e-5)
            assert layer.mass[h] <= layer.best[h] + 1e-6
        if not layer.sparse:
            assert layer.mass.tolist() == pytest.approx([1.0] * found.heads)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_mass_of_the_dense_original_counts_patches(kind):
    family, how = KINDS[kind]
    model = grafted(family, patches=(3, 4), **how)
    dense = original(family, model)
    x = images(model, 1)
    found = inspection.inspect(model, x[0], range(12), dense)
    P = len(found.prefix)
    assert found.reference == inspection.DENSE
    twin = graft.graft(copy.deepcopy(dense), SparsityConfig(keep="dense"))
    for layer, (module, q, k, _, _) in zip(found.layers, seen(twin, x), strict=True):
        true = softmax_rows(q[0], k[0], module.scale, torch.ones(q.shape[2]))
        for h in range(found.heads):
            shares = []
            for patch in range(12):
                if layer.rows[patch] < 0:
                    continue
                kept = layer.kept[h, patch]
                share = sum(float(true[h, P + patch, i]) for i in range(P) if kept[i])
                for key in range(12):
                    if layer.owner[key] >= 0 and kept[P + layer.owner[key]]:
                        share += float(true[h, P + patch, P + key])
                shares.append(share)
            assert float(layer.mass[h]) == pytest.approx(sum(shares) / len(shares), abs=1e-5)
            assert layer.mass[h] <= layer.best[h] + 1e-6


def test_keep_one_keeps_all_of_it():
    model = grafted("deit", keep=1.0)
    for dense in (None, original("deit", model)):
        found = inspection.inspect(model, images(model)[0], dense=dense)
        for layer in found.layers:
            torch.testing.assert_close(layer.mass, torch.ones(3))
            assert bool(layer.kept.all()) and not layer.tail.any()


@pytest.mark.parametrize("way", ["merge", "evit", "evit-fused"])
def test_survivors_are_those_of_the_stage(way):
    model = grafted("deit", tokens=dict(way=way, keep=0.5, stages=(1, 2)))
    x = images(model, 1)
    found = inspection.inspect(model, x[0])
    fused = way == "evit-fused"
    assert [(s.block, s.before, s.after) for s in found.stages] == [(0, 24, 12 + fused), (1, 12 + fused, 6 + fused)]
    with torch.inference_mode():
        _, tokens = model.forward_tokens(x, True)
    assert torch.equal(found.stages[1].owner, tokens.owner[0])
    for stage in found.stages:
        there = stage.owner[stage.owner >= 0]
        assert sorted(set(there.tolist())) == list(range(stage.after))
        assert bool((stage.owner < 0).any()) == (way == "evit")
    assert torch.equal(found.layers[1].owner, found.stages[0].owner)


def test_a_query_that_has_left_keeps_nothing():
    model = grafted("deit", tokens=dict(way="evit", keep=0.5, stages=(1,)))
    found = inspection.inspect(model, images(model)[0], range(24))
    gone = found.layers[1].rows < 0
    assert int(gone.sum()) == 12 and torch.equal(gone, found.stages[0].owner < 0)
    assert not found.layers[1].kept[:, gone].any() and not found.layers[1].weight[:, gone].any()
    assert not found.layers[1].tail[:, gone].any()


def test_a_block_without_patch_rows_is_not_made_up():
    model = grafted("deit", tokens=dict(way="merge", keep=(0.5, 0.0)))
    found = inspection.inspect(model, images(model)[0])
    assert found.layer(0) is not None and found.layer(1) is None and found.depth == 2
    assert found.stages[1].after == 0 and bool((found.stages[1].owner == -1).all())


def test_prefix_tokens_have_their_names():
    for family, names in {
        "vit-avg-pool": (),
        "deit": ("cls",),
        "deit-distilled": ("cls", "dist"),
        "dinov2-registers": ("cls", "reg", "reg", "reg", "reg"),
    }.items():
        assert inspection.prefix_names(build(family)) == names


def test_the_model_is_left_as_it_was():
    model = grafted("deit", tokens=dict(keep=0.5, stages=(1,)))
    x = images(model)
    with torch.inference_mode():
        before = model(x)
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    executions = [module.execution for module in attention.attention_modules(model).values()]
    inspection.inspect(model, x[0], dense=original("deit", model))
    with pytest.raises(AssertionError), torch.inference_mode():
        inspection.inspect(model, x[0, :, :-1])  # an image that does not fit stops it half-way
    with pytest.raises(ZeroDivisionError), observe.watching_calls(model, lambda *_: 1 / 0):
        model(x)
    assert keys == {name: set(vars(module)) for name, module in model.named_modules()}
    assert not any(module._forward_hooks for module in model.modules())
    assert executions == [module.execution for module in attention.attention_modules(model).values()]
    with torch.inference_mode():
        assert torch.equal(model(x), before)


def test_default_queries_are_patches_of_every_grid():
    assert inspection.default_queries((14, 14)) == (7 * 14 + 7, 15)
    assert inspection.default_queries((1, 1)) == (0,)
    assert inspection.default_queries((3, 8)) == (1 * 8 + 4, 1)


def test_what_cannot_be_looked_at_is_refused():
    dense, model = build("deit"), grafted("deit")
    with pytest.raises(SparsifyError, match="convert it first"):
        inspection.inspect(dense, images(dense)[0])
    with pytest.raises(UsageError, match="0 to 23"):
        inspection.inspect(model, images(model)[0], [24])
    with pytest.raises(UsageError, match="patches"):
        inspection.inspect(model, images(model)[0], dense=dense)
