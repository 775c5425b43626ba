"""Models with token stages, for every supported host, against timm's own blocks and slow oracles."""

import contextlib
import copy
import functools
import io
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from timm.layers import Attention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock

from helpers.families import FAMILIES, LEAVING, build, draw_importance, images, ways_of
from helpers.merging_by_hand import merged_by_hand, ranked_by_hand
from sparsify.config import SparsityConfig, Tokens, validate
from sparsify.errors import UsageError
from sparsify.nn import execution, graft, merging, projection, token_models
from sparsify.nn.attention import Execution, SparseAttention, attention_modules, sparse_modules
from sparsify.nn.merging import matching
from sparsify.nn.predictor import TokenLowrankPredictor
from sparsify.nn.tokens import WAYS, TokenStage
from sparsify.ops import attention
from sparsify.ops.spec import budget

KINDS = ["deit", "deit-distilled", "dinov2-registers", "vit-avg-pool", "siglip", "res-post-norm", "qk-norm", "gated"]
PLACED = [
    "eva", "eva02", "eva-post-norm", "dinov3", "rope-mixed", "rope-qk-norm-few-keys", "beit", "beit-shared-bias",
    "beit-both-biases",
]  # fmt: skip
PLACED = [family for family in PLACED if family in FAMILIES]  # an older timm has fewer
NO_PREFIX = ["vit-avg-pool", "siglip", "res-post-norm"]
NARROW = {
    family: dict(embed_dim=96, num_heads=3) for family in ("clip", "siglip", "dinov2", "dinov2-registers", "deit3")
}


@functools.cache
def host(family, depth=2):
    """A dense model of two narrow blocks, for reading only."""
    return build(family, depth=depth, **NARROW.get(family, {}))


def reduced(dense, way="merge", tokens=0.5, stages=(1, 2), importance="attention", **settings):
    """A copy of the model with stages; dense attention unless `settings` say otherwise. Random predictors and importance."""
    model = copy.deepcopy(dense)
    settings = {"keep": "dense", "rank": 8, "cells": (2, 2), **settings}
    token_stages = Tokens(way=way, keep=tokens, stages=stages, importance=importance)
    graft.graft(model, SparsityConfig(tokens=token_stages, **settings))
    execution.set_execution(model, Execution("reference"))
    g = torch.Generator().manual_seed(5)
    for parameter in (p for m in model.modules() if isinstance(m, TokenLowrankPredictor) for p in m.parameters()):
        parameter.data.copy_(torch.rand(parameter.shape, generator=g) / parameter.shape[-1])
    return draw_importance(model)


def importances(model):
    """w and b of each block; None where its stage uses importance by attention."""
    return [module.importance for module in attention_modules(model).values()]


@contextlib.contextmanager
def watched(model):
    """What is known of the tokens after every stage that chooses some: a list that fills as the model runs."""
    seen = []
    hooks = [s.register_forward_hook(lambda m, args, out: seen.append(out[1])) for _, s in token_models.stages(model)]
    yield seen
    for hook in hooks:
        hook.remove()


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def first_input(dense, image):
    """What the first block is given, the rotary embedding of each block (or None), and the bias that blocks share."""
    h = dense.patch_embed(image)
    if isinstance(dense, Beit):
        h = torch.cat([dense.cls_token, h], 1)
        h = h if dense.pos_embed is None else h + dense.pos_embed
        return h, [None] * len(dense.blocks), 0 if dense.rel_pos_bias is None else dense.rel_pos_bias()
    h, rope = dense._pos_embed(h), None
    if isinstance(dense, Eva):
        h, rope = h
    own = rope is not None and rope.ndim > 2
    return dense.norm_pre(h), list(rope) if own else [rope] * len(dense.blocks), 0


def times(gamma, x):
    return x if gamma is None else gamma * x


def by_hand(dense, x, way, shares, fitted=itertools.repeat(None)):
    """Timm's own blocks, one image at a time, without gathering: removed tokens are masked keys; fitted: `importances`.

    Returns:
        Features before the last norm: [B, P + n, C] of the remaining tokens, and [B, P + n0, C] of all patches.
    """
    P, left, whole = dense.num_prefix_tokens, [], []
    rows = 0 if dense.cls_token is None else 2 if hasattr(dense, "dist_token") else 1
    for image in x.split(1):
        h, ropes, shared = first_input(dense, image)
        N = h.shape[1]
        present, owner, last, size = list(range(N - P)), list(range(N - P)), h[0, P:].clone(), torch.ones(N)
        for block, share, rope, weights in zip(dense.blocks, shares, ropes, fitted, strict=False):
            post, before = isinstance(block, ResPostBlock | EvaBlockPostNorm), h[0].clone()
            scaled = [getattr(block, f"ls{i}", None) or functools.partial(times, getattr(block, f"gamma_{i}", None))
                      for i in (1, 2)]  # fmt: skip
            seen = torch.cat([torch.arange(P), torch.tensor(present, dtype=torch.int64) + P])
            mask = torch.full((N,), -torch.inf).index_put((seen,), size[seen].log())
            a = h if post else block.norm1(h)
            mask, bias = mask.expand(block.attn.num_heads, N, N), torch.zeros(())
            if isinstance(block, BeitBlock):
                bias = (0 if block.attn.window_size is None else block.attn._get_rel_pos_bias()[0]) + shared
                out = block.attn(a, shared_rel_pos_bias=mask + shared)
            else:
                out = block.attn(a, attn_mask=mask, **({} if rope is None else {"rope": rope}))
            h = h + (block.norm1(out) if post else scaled[0](out))
            if share is not None:
                m = min(len(present), math.ceil(share * (N - P) - 1e-9))
                q, k = (t[0].transpose(0, 1) for t in projection.heads(block.attn, a, rope)[:2])  # (N, H, d)
                asking = q[:rows] if rows else q[seen].mean(0, keepdim=True)
                logits = torch.einsum("ihd,jhd->hij", asking, k) * q.shape[-1] ** -0.5 + mask[:, : len(asking)]
                logits = logits + (bias[:, : len(asking)] if bias.ndim else 0)
                I = logits.softmax(-1).mean((0, 1))[P:][present]
                patch = h[0, P:][present]
                if weights is not None:
                    norm = (patch - patch.mean(1, keepdim=True)) / (
                        patch.var(1, keepdim=True, correction=0) + 1e-5
                    ).sqrt()
                    I = size[P:][present] * (norm @ weights[:-1] + weights[-1]).exp()
                if m == 0:
                    keep, into = [], [None] * len(present)
                elif way == "merge":
                    keep, into = merged_by_hand(patch, I, m)
                else:
                    keep, into = ranked_by_hand(I, m, way == "evit-fused" and m < len(present))
                for old in keep:
                    group = [j for j in range(len(present)) if into[j] == old]
                    w = I[group] / I[group].sum()
                    h[0, P + present[old]] = (w[:, None] * patch[group]).sum(0)
                    if way == "merge":
                        own = size[P:][present][group]
                        size[P + present[old]] = (I[group].sum().log() - (w * (I[group] / own).log()).sum()).exp()
                goes = {present[j]: None if to is None else present[to] for j, to in enumerate(into)}
                for p, slot in enumerate(owner):
                    if slot is not None:
                        owner[p] = goes[slot]
                        if owner[p] is None:
                            last[p] = before[P + slot] if m == 0 else patch[present.index(slot)]
                present = [present[j] for j in keep]
            h = h + (block.norm2(block.mlp(h)) if post else scaled[1](block.mlp(block.norm2(h))))
        left.append(torch.cat([h[0, :P], h[0, P:][present]]))
        whole.append(
            torch.cat([h[0, :P], *(last[p : p + 1] if s is None else h[0, P + s, None] for p, s in enumerate(owner))])
        )
    return torch.stack(left), torch.stack(whole)


# Equal to the dense model, and to slow oracles

RATES = [
    (f, t)
    for f in KINDS
    for t in (0.5, (0.3, 1.0), (0.6, 0.0), (0.0, 1.0), (0.0, 0.5))
    if f not in NO_PREFIX or t in (0.5, (0.3, 1.0))
] + [(f, (0.6, 0.5, 1.0)) for f in ("deit", "siglip")]


@pytest.mark.parametrize("family,way", ways_of(WAYS))
def test_keep_one_and_token_keep_one_equal_dense(family, way):
    """Through importance, matching or ranking, means, sizes, places and the sparse op with b = N: no short-cut."""
    dense = host(family)
    predictor = "token-lowrank" if way == "evit" else "head-lowrank"
    model, x = reduced(dense, way, 1.0, keep=1.0, predictor=predictor), images(dense)
    with torch.no_grad(), watched(model) as seen:
        close(model(x), dense(x))
        close(model.forward_features(x, full_grid=True), dense.forward_features(x))
        close(model.forward_features(x, full_grid=False), dense.forward_features(x))
    assert len(seen) == 6 and all(t.place.shape == (2, 36) for t in seen)
    assert all((t.size is not None) == (way == "merge") for t in seen)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family,tokens", RATES)
def test_dense_attention_over_the_tokens_left_is_masked_attention(family, way, tokens):
    dense = host(family, len(tokens) if isinstance(tokens, tuple) else 2)
    model, x = reduced(dense, way, tokens), images(dense, 3)
    with torch.no_grad():
        shares = Tokens(keep=tokens, stages=(1, 2)).shares(len(dense.blocks))
        left, whole = (dense.norm(t) for t in by_hand(dense, x, way, shares))
        close(model.forward_features(x, full_grid=False), left)
        close(model.forward_features(x, full_grid=True), whole)
        close(model(x), dense.forward_head(whole if way == "merge" and family in NO_PREFIX else left))
        assert (model(x) - dense(x)).abs().max() > 1e-4  # tokens are really removed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "family", ["deit", "vit-avg-pool", "res-post-norm", *(f for f in ("eva", "beit") if f in FAMILIES)]
)
def test_fitted_importance_is_predicted_from_the_token_and_its_size(family, way):
    """Two stages: the second meets merged tokens. One of rate 0 after them needs no importance."""
    dense = host(family, 3)
    rates = (0.6, 0.5, 1.0) if family in NO_PREFIX else (0.6, 0.5, 0.0)
    model, x = reduced(dense, way, rates, importance="fitted"), images(dense, 3)
    own = importances(model)
    assert [w is None for w in own] == [False, False, True] and own[0].shape == (dense.embed_dim + 1,)
    with torch.no_grad():
        left, whole = (dense.norm(t) for t in by_hand(dense, x, way, Tokens(keep=rates).shares(3), own))
        close(model.forward_features(x, full_grid=False), left)
        close(model.forward_features(x, full_grid=True), whole)
        by_attention = reduced(dense, way, rates)(x)
        assert (model(x) - by_attention).abs().max() > 1e-4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "family,tokens", [(f, 0.5) for f in PLACED] + [("beit", (0.6, 0.0)), ("rope-mixed", (0.0, 0.5))]
)
def test_rope_and_biases_are_those_of_the_places_that_stay(family, way, tokens):
    """A merged token has the position of the token that the others were merged into."""
    dense = host(family)
    model, x = reduced(dense, way, tokens), images(dense, 3)
    with torch.no_grad():
        left, whole = (dense.norm(t) for t in by_hand(dense, x, way, Tokens(keep=tokens, stages=(1, 2)).shares(2)))
        close(model.forward_features(x, full_grid=False), left)
        close(model.forward_features(x, full_grid=True), whole)
        assert (model(x) - dense(x)).abs().max() > 1e-4  # tokens are really removed


def test_naflexvit_refuses_token_stages():
    with pytest.raises(UsageError, match="NaFlexVit.*without token_keep"):
        reduced(host("naflexvit"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("settings", [{}, dict(predictor="token-lowrank"), dict(granularity="tile", tile=(2, 2))])
def test_images_of_a_batch_do_not_meet(family, way, settings):
    model, x = reduced(host(family), way, 0.6, keep=0.3, **settings), images(host(family), 8)
    with torch.no_grad():
        whole = model(x)
        close(model(x[2:3]), whole[2:3])
        close(model(x.flip(0)), whole.flip(0))
        assert torch.equal(model(x), whole)


def test_merging_equal_patches_loses_nothing(monkeypatch):
    """Images of equal neighbours, no position embedding: half of the tokens go, and the logits stay."""
    monkeypatch.setattr(merging, "CANDIDATES", 40)  # all are candidates, so that every token finds its twin
    dense = build("deit", depth=3)
    dense.pos_embed.data[:, 1:] = 0
    x = images(dense, 3).unflatten(-1, (3, 2, 16))[..., :1, :].expand(-1, -1, -1, -1, 2, -1).flatten(-3)
    model = reduced(dense, "merge", (0.5, 1.0, 1.0))
    with torch.no_grad(), watched(model) as seen:
        close(model(x), dense(x))
        close(model.forward_features(x, full_grid=True), dense.forward_features(x))
    expected = torch.tensor([1.0] + [2.0] * 18).expand(3, -1)
    close(seen[0].size, expected)
    sparse = reduced(dense, "merge", (0.5, 1.0, 1.0), keep=1.0, tail="cells")
    with torch.no_grad():
        close(sparse(x), dense(x))


@pytest.mark.parametrize("keep", ["dense", 0.3])
@pytest.mark.parametrize("family", [f for f in LEAVING if f not in (*NO_PREFIX, "perception-encoder")])
def test_rate_0_at_the_last_block_changes_nothing_that_a_class_token_reads(family, keep):
    dense = host(family)
    if dense.global_pool != "token":
        dense = build(family, global_pool="token", **NARROW.get(family, {}))
    model, x = reduced(dense, "merge", (1.0, 0.0), keep=keep), images(dense)
    with torch.no_grad():
        logits = model(x)
        assert model.forward_features(x).shape[1] == dense.num_prefix_tokens
        graft.set_token_stages(model, SparsityConfig())
        close(logits, model(x), 1e-5)


@pytest.mark.parametrize("more", [dict(global_pool="avg"), dict(global_pool="avg", pool_include_prefix=True),
                                  dict(global_pool="max", class_token=False, reg_tokens=2)])  # fmt: skip
@pytest.mark.parametrize("way", WAYS)
def test_rate_0_with_a_classifier_that_reads_patches(more, way):
    """It reads the patches as they were last seen, and never nothing."""
    dense = build("deit", **more)
    x, tokens = images(dense), (0.5, 0.0)
    model = reduced(dense, way, tokens)
    with torch.no_grad():
        whole = by_hand(dense, x, way, Tokens(keep=tokens).shares(2))[1]
        close(model(x), dense.forward_head(dense.norm(whole)))


# What comes out


@pytest.mark.parametrize("way", WAYS)
def test_features_are_the_tokens_left_where_only_prefix_tokens_are_read(way):
    def shapes(dense):
        x = images(dense)
        model = reduced(dense, way)
        with torch.no_grad():
            return [model.forward_features(x, full_grid=full).shape[1] for full in (None, False, True)]

    left = 9 + 1 * (way == "evit-fused")
    full = {"merge": 36, "evit": left, "evit-fused": left}[way]  # with a classifier that uses the patches
    assert shapes(host("deit")) == [1 + left, 1 + left, 37] and shapes(host("deit-distilled")) == [
        2 + left,
        2 + left,
        38,
    ]
    assert shapes(host("dinov2-registers")) == [5 + left, 5 + left, 41]
    assert shapes(host("vit-avg-pool")) == [full, left, 36] and shapes(host("siglip")) == [full, left, 36]
    assert shapes(build("deit", global_pool="avg")) == [1 + full, 1 + left, 37]
    assert shapes(build("deit", num_classes=0)) == [37, 1 + left, 37]  # no classifier: all features are output
    model = reduced(host("deit"), way)
    model.reset_classifier(0)
    assert model.forward_features(images(model)).shape[1] == 37
    model.reset_classifier(5, "avg")
    assert model.forward_features(images(model)).shape[1] == 1 + full and model(images(model)).shape == (2, 5)


OPTIONS = dict(
    indices=[None, 1, [0], [1, 0]], output_fmt=["NCHW", "NLC"], return_prefix_tokens=[False, True], norm=[False, True],
    stop_early=[False, True], intermediates_only=[False, True], output_dict=[False, True],
)  # fmt: skip


@pytest.mark.parametrize("family", ["deit", "vit-avg-pool", "dinov2-registers", "res-post-norm"])
def test_intermediates_are_timms(family):
    """At token keep 1 the same numbers in the same containers; with fewer tokens the same shapes."""
    dense = host(family)
    same, few, x = reduced(dense, tokens=1.0), reduced(dense, "evit", 0.5), images(dense, 1)
    every = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
    with torch.no_grad():
        for arguments in every[:: 1 if family == "deit" else 7]:
            expected = dense.forward_intermediates(x, **arguments)
            close(same.forward_intermediates(x, **arguments), expected)
            found = few.forward_intermediates(x, **arguments)
            shapes = [torch.utils._pytree.tree_map(lambda t: t.shape, o) for o in (found, expected)]
            assert shapes[0] == shapes[1]
        for model in (same, few):
            final, parts = model.forward_intermediates(x, norm=True, output_fmt="NLC", return_prefix_tokens=True)
            close(final, model.forward_features(x, full_grid=True), 0)
            assert torch.equal(torch.cat(parts[-1][::-1], 1) if dense.num_prefix_tokens else parts[-1], final)
        close(same.get_intermediate_layers(x, n=2, reshape=True), dense.get_intermediate_layers(x, n=2, reshape=True))
        with pytest.raises((ValueError, AssertionError), match="NCHW"):
            few.forward_intermediates(x, output_fmt="NHWC")


def test_pruned_to_the_blocks_whose_features_are_wanted():
    model, x = reduced(host("deit")), images(host("deit"))
    with torch.no_grad():
        expected = model.forward_intermediates(x, [0], intermediates_only=True)
        assert model.prune_intermediate_layers([0]) == [0] and len(model.blocks) == 1
        close(model.forward_intermediates(x, intermediates_only=True), expected, 0)
        assert model(x).shape == (2, 37, 192)


@pytest.mark.parametrize("way", WAYS)
def test_masks_are_refused(way):
    model = reduced(host("deit"), way)
    x, mask = images(model), torch.ones(1, 1, 37, 37, dtype=torch.bool)
    calls = (model.forward, model.forward_features, model.forward_intermediates)
    for call, arguments in itertools.product(calls, (dict(attn_mask=mask), dict(is_causal=True))):
        with pytest.raises(NotImplementedError, match="token"):
            call(x, **arguments)
    graft.set_token_stages(model, SparsityConfig())
    assert model(x, attn_mask=mask).shape == (2, 10)


# Putting in and taking out


@pytest.mark.parametrize("family", KINDS)
def test_stages_leave_no_trace(family):
    """State dict as of attention alone; the dense twin is the original; `reduce` takes stages out and puts others in."""
    dense = host(family)
    x, own = images(dense), {name: type(m) for name, m in dense.named_modules()}
    model, plain = reduced(dense, keep=(0.3, "dense")), copy.deepcopy(dense)
    graft.graft(plain, SparsityConfig(keep=(0.3, "dense"), rank=8, cells=(2, 2)))
    execution.set_execution(plain, Execution("reference"))
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    twin = graft.dense_twin(model)
    assert {name: type(m) for name, m in twin.named_modules()} == own
    for name, original in dense.named_modules():
        assert set(vars(twin.get_submodule(name))) == set(vars(original))
    assert all(p is model.get_parameter(name) for name, p in twin.named_parameters())
    with torch.no_grad():
        assert torch.equal(twin(x), dense(x))
        first = model(x)
        clone = copy.deepcopy(model)
        by_attention = dict(importance="attention", stages=(2,), way="evit")
        graft.set_token_stages(model, SparsityConfig(tokens=Tokens(keep=0.9, **by_attention)))
        assert [(i, s.way, s.share) for i, s in token_models.stages(model)] == [(1, "evit", 0.9)]
        assert not torch.equal(model(x), first) and torch.equal(clone(x), first)
        graft.set_token_stages(model, SparsityConfig())
        assert not list(token_models.stages(model)) and type(model) is type(dense)
        close(model(x), plain(x), 1e-5)
        graft.set_token_stages(model, SparsityConfig(tokens=Tokens(stages=(1, 2), keep=0.5, importance="attention")))
        assert torch.equal(model(x), first)
        graft.set_token_stages(model, SparsityConfig(tokens=Tokens(stages=(2,))))
        assert list(model.state_dict().keys() - plain.state_dict().keys()) == ["blocks.1.attn.importance"]
        assert {name: type(m) for name, m in graft.dense_twin(model).named_modules()} == own
        assert list(graft.dense_twin(model).state_dict()) == list(dense.state_dict())
        graft.set_token_stages(model, SparsityConfig())
        assert list(model.state_dict()) == list(plain.state_dict())


def _without_predictors(model):
    return [p for name, p in model.named_parameters() if ".predictor." not in name]


def test_saved_whole_and_moved():
    model, file = reduced(host("deit"), keep=0.3, predictor="token-lowrank"), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = images(model)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        assert again.to("meta")(x.to("meta")).shape == (2, 10)
        assert model.double()(x.double()).dtype == torch.float64


def test_rates_that_do_not_fit_are_refused():
    def refused(match, family="deit", **tokens):
        dense = copy.deepcopy(host(family))
        before = {name: type(m) for name, m in dense.named_modules()}
        with pytest.raises(UsageError, match=match) as caught:
            graft.graft(dense, validate(SparsityConfig, dict(keep="dense", tokens=tokens), "option"))
        assert "\n" not in str(caught.value)
        assert {name: type(m) for name, m in dense.named_modules()} == before  # nothing was exchanged

    refused("3 rates.*2 blocks", keep=(0.5, 0.5, 0.5))
    refused("1 rates.*2 blocks", keep=(0.5,))
    refused("3", stages=(1, 3))
    refused("1,1", stages=(1, 1))
    refused("stages", stages=())
    refused("stages", stages=(0, 1))
    refused("token stages 4,7,10: expected different blocks from 1 to 2", keep=0.5, stages=(4, 7, 10))
    for family in NO_PREFIX:
        refused("leaves nothing", family, keep=(0.5, 0.0))
    for wrong in (0, -0.5, 1.5, math.nan, math.inf, "0,5", None, (0.5, math.nan), (0.5, -1), (0.5, 2)):
        refused("keep", keep=wrong, stages=(1, 2))
    for wrong in (1.5, (1.5,), "x"):
        refused("stages", stages=wrong)
    refused("way", way="tome")
    refused("rate", rate=0.5)


@pytest.mark.parametrize("wrong", [dict(keep=True), dict(keep=(True, 0.5)), dict(stages=(True,))])
def test_truth_values_are_no_rates(wrong):
    with pytest.raises(UsageError):
        validate(SparsityConfig, dict(keep="dense", tokens=wrong), "option")


def test_dropout_of_the_attention_is_refused_and_not_forgotten():
    model = reduced(build("deit", attn_drop_rate=0.1))
    x = images(model)
    assert model(x).shape == (2, 10)
    with pytest.raises(NotImplementedError, match="attn_drop_rate"):
        model.train()(x)
    with pytest.raises(NotImplementedError, match="attn_drop_rate"):
        reduced(build("deit", attn_drop_rate=0.1), tokens=(0.0, 1.0)).train()(x)


# Other sizes


@pytest.mark.parametrize("predictor", ["head-lowrank", "token-lowrank"])
@pytest.mark.parametrize("way", WAYS)
def test_another_image_size(way, predictor):
    dense = build("deit", patches=8)
    model = reduced(dense, way, 0.5, keep=0.4, predictor=predictor)
    graft.resize(model, 96)
    x = images(model)
    with torch.no_grad(), watched(model) as seen:
        model(x)
    assert x.shape[-1] == 96 and [t.place.shape[1] for t in seen] == [
        18 + (way == "evit-fused"),
        9 + (way == "evit-fused"),
    ]
    plain, full = reduced(dense, way, 0.5), reduced(dense, way, 1.0, keep=1.0, predictor=predictor)
    for m in (plain, full):
        graft.resize(m, 96)
    dense.set_input_size(img_size=(96, 96))
    with torch.no_grad():
        close(full(x), dense(x))
        close(plain(x), reduced(dense, way, 0.5)(x), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_dynamic_image_sizes(way):
    """Larger, smaller and oblong images than the model's own, with tails and tiles that depend on the grid."""
    dense = build("deit", dynamic_img_size=True)
    full, x = reduced(dense, way, 1.0, keep=1.0, granularity="tile"), images(dense)
    few = reduced(dense, way, 0.5, keep=0.4, granularity="tile", tail="cells")
    with torch.no_grad():
        for height, width in ((6, 6), (8, 8), (4, 4), (3, 5), (6, 12), (1, 1)):
            x = torch.randn(2, 3, 16 * height, 16 * width, generator=torch.Generator().manual_seed(2))
            close(full(x), dense(x))
            parts = few.forward_intermediates(x, intermediates_only=True)
            assert [p.shape for p in parts] == [(2, 192, height, width)] * 2 and few(x).isfinite().all()
        moved = reduced(dense, way, 0.5, keep=0.4, granularity="tile", tail="none")
        still = copy.deepcopy(moved)
        graft.resize(still, 128)
        x = images(still)
        close(moved(x), still(x))


@pytest.mark.parametrize("tail", ["none", "mean", "cells", "clusters"])
@pytest.mark.parametrize("way", WAYS)
def test_few_tokens_left_and_few_patches(way, tail):
    for patches, tokens, left in (
        (6, 0.08, 3),
        (6, 1 / 36, 1),
        (1, 0.5, 1),
        (2, (1.0, 0.3, 1.0), 2),
        (1, (0.0, 1.0, 1.0), 0),
    ):
        dense = build("deit", patches=patches, depth=3)
        for keep in (0.1, 1.0):
            model = reduced(dense, way, tokens, stages=(1,), keep=keep, tail=tail)
            with torch.no_grad():
                y = model.forward_features(images(dense))
                full = model.forward_features(images(dense), full_grid=True)
            fused = way == "evit-fused" and 0 < left < patches**2
            assert y.shape[1] == 1 + left + fused and full.shape[1] == 1 + patches**2
            assert y.isfinite().all() and full.isfinite().all()


@pytest.mark.parametrize("more", [{}, dict(granularity="tile", tile=(2, 2))])
@pytest.mark.parametrize("predictor", ["head-lowrank", "token-lowrank"])
@pytest.mark.parametrize("way", WAYS)
def test_budget_and_cells_follow_the_tokens_present(way, predictor, more, monkeypatch):
    dense, calls = host("deit", 3), []
    real = attention.attention

    def recording(*arguments):
        q, _, _, _, context, spec, *_ = arguments
        calls.append((q.shape[2], context.size, context.place, spec))
        return real(*arguments)

    monkeypatch.setattr(attention, "attention", recording)
    model = reduced(dense, way, 0.5, keep=0.3, cells=(4, 3), predictor=predictor, **more)
    with torch.no_grad():
        model(images(dense))
    fused = way == "evit-fused"
    assert [N for N, *_ in calls] == [37, 19 + fused, 10 + fused]
    for i, (N, size, place, spec) in enumerate(calls):
        assert spec.budgets == (math.ceil(0.3 * N),) == (budget(0.3, N),) and spec.grid == (6, 6) and spec.prefix == 1
        assert (size is not None) == (i > 0 and way == "merge") and (place is not None) == (i > 0)
        assert spec == model.blocks[i].attn.spec(N) if i == 0 else math.prod(spec.cells[0]) < 12
    counts = [math.prod(spec.cells[0]) for *_, spec in calls]
    assert counts[0] == 12 and counts == sorted(counts, reverse=True)
    assert abs(counts[1] - 12 * calls[1][0] / 37) <= 1.5  # in proportion to the tokens, up to the next grid


@pytest.mark.parametrize("way", WAYS)
def test_dense_attention_in_the_place_of_sparse_knows_the_tokens(way):
    """`auto` may use dense attention for removed and merged tokens, as in a model whose attention is dense."""

    class Dense:
        shapes, withdrawn = (), False

        def choose(self, shape, sparse):
            self.shapes += (shape,)
            return SimpleNamespace(taken="sdpa")

    dense, chooser = host("deit", 3), Dense()
    model, x = reduced(dense, way, (0.5, 0.6, 1.0), keep=0.1), images(dense)
    execution.set_execution(model, Execution("reference", dense_fallback=True, choose=chooser))
    with torch.no_grad():
        close(model(x), reduced(dense, way, (0.5, 0.6, 1.0))(x), 1e-5)
    left = [(37, False, False), *((n + (way == "evit-fused"), way == "merge", True) for n in (19, 12))]
    assert [(s.tokens, s.merged, s.placed) for s in chooser.shapes] == left


# Predictors


def test_folding_does_not_change_which_tokens_merge():
    """The matching compares the residual stream; the keys, whose basis folding changes, would match others."""
    dense, g = host("deit"), torch.Generator().manual_seed(0)
    x, models = images(dense, 4), {}
    basis = torch.randn(3, 64, 64, generator=g, dtype=torch.float64)
    inverse = torch.linalg.inv(basis).mT
    for fold in (True, False):
        models[fold] = model = reduced(dense, "merge", 0.5, keep=0.5, rank=64, fold=fold)
        for module in sparse_modules(model).values():
            assert module.predictor.folded is fold
            graft.set_basis(module, module.predictor, basis, inverse)
    found, keys = {}, {}
    with torch.no_grad():
        for fold, model in models.items():
            with watched(model) as seen:
                found[fold] = (model.forward_features(x, full_grid=True), [(t.owner, t.place, t.size) for t in seen])
            h = model.norm_pre(model._pos_embed(model.patch_embed(x)))
            keys[fold] = model.blocks[0].attn.qkv_heads(model.blocks[0].norm1(h))[1].mean(1)[:, 1:]
    close(found[True][0], found[False][0], 1e-3)
    for one, other in zip(found[True][1], found[False][1], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        close(one[2], other[2], 1e-3)
    I = torch.ones(4, 36)
    assert not torch.equal(matching(keys[True], I, 18)[1], matching(keys[False], I, 18)[1])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [(0.6, 0.5, 1.0), (0.5, 0.0, 1.0)])
def test_token_lowrank_predictors_go_on_working(way, shared, tokens):
    """Over merged and dropped tokens, and over the prefix alone; owners are followed where they are needed."""
    knobs = dict(shared_projection=shared)
    model = reduced(build("deit", depth=3), way, tokens, keep=0.3, predictor="token-lowrank", token_lowrank=knobs)
    x = images(model)
    with torch.no_grad(), watched(model) as seen:
        logits = model(x)
    assert logits.isfinite().all() and all((t.owner is not None) == (way == "merge") and t.seen is None for t in seen)
    assert len(seen) == (1 if 0 in tokens else 2)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in _without_predictors(model) if p.requires_grad)


# Training, compiling


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["deit", "vit-avg-pool", "res-post-norm"])
def test_gradients_with_and_without_checkpointing(family, way):
    model = reduced(host(family), way, 0.5, keep=(0.3, "dense")).train()
    x, found = images(model), []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        assert all(grad is not None and grad.isfinite().all() for grad in found[-1].values())
    close(found[1], found[0], 1e-5)
    with torch.no_grad():
        close(model(x), model.eval()(x), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_slopes(way):
    """Behind a stage for every way; before it for `evit`, as importance and sizes count as constants."""
    model = reduced(host("deit"), way, 0.6, (1,)).double()
    x = images(model).double()
    model(x).square().sum().backward()
    for name in ["blocks.1.attn.qkv.weight"] + ["blocks.0.attn.qkv.weight", "patch_embed.proj.bias"] * (way == "evit"):
        parameter = model.get_parameter(name)
        slope, step, values = parameter.grad.norm(), 1e-6, []
        with torch.no_grad():
            for sign in (1, -2, 1):  # up, down, back
                parameter += sign * step * parameter.grad / slope
                values.append(model(x).square().sum())
        close((values[0] - values[1]) / (2 * step), slope, 1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_and_autocast(way):
    model = reduced(host("deit"), way, 0.5, keep=0.3)
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16), watched(model) as seen:
        model.train()(x).square().mean().backward()
    assert all(t.size is None or t.size.dtype == torch.float32 for t in seen)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = model.eval().bfloat16()
    with torch.no_grad(), watched(model) as seen:
        assert model(x.bfloat16()).dtype == torch.bfloat16
        assert model.forward_features(x.bfloat16(), full_grid=True).dtype == torch.bfloat16
    assert all(t.size is None or t.size.dtype == torch.float32 for t in seen)


CASES = [
    ("deit", "merge", 0.5, dict(keep=0.3)), ("deit", "merge", (0.5, 0.0), dict(keep=0.3, predictor="token-lowrank")),
    ("deit", "evit-fused", 0.5, {}), ("siglip", "merge", 0.5, {}), ("vit-avg-pool", "evit", 0.5, dict(keep=0.3)),
]  # fmt: skip


@pytest.mark.parametrize("family,way,tokens,settings", CASES)
def test_compiled_and_exported(family, way, tokens, settings):
    model = reduced(host(family), way, tokens, **settings)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        torch.compiler.reset()
        close(torch.compile(model, backend="eager", fullgraph=True)(x), expected, 1e-5)
        close(torch.export.export(model, (x,)).module()(x), expected, 1e-5)


def test_what_the_model_prints():
    text = str(reduced(host("deit"), "evit", 0.5, keep=(0.3, "dense")))
    assert "way=evit, share=0.5" in text and "way=evit, share=0.25" in text
    types = [type(m) for m in reduced(host("deit"), keep=(0.3, "dense")).modules()]
    assert types.count(SparseAttention) == 1 and types.count(TokenStage) == 2 and Attention not in types
