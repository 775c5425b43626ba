"""What is drawn is what the ops compute: the same keys, the same weights, ties and all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.families import grafted, images
from helpers.op_calls import head_lowrank, head_ranking
from sparsify.nn import execution, observe
from sparsify.nn.attention import SparseAttention, sparse_modules
from sparsify.ops import selection, weights
from sparsify.ops.selection import Context
from sparsify.ops.spec import Spec

CASES = {
    "deit": ("deit", {}),
    "no cls": ("vit-avg-pool", dict(granularity="tile", tile=(2, 2))),
    "registers": ("dinov2-registers", dict(granularity="tile", tile=(4, 2))),
    "distilled, mean": ("deit-distilled", dict(tail="mean")),
    "cells": ("deit", dict(tail="cells", cells=(2, 3))),
    "no tail": ("qk-norm", dict(tail="none")),
    "token-lowrank": ("deit", dict(predictor="token-lowrank", rank=5, tail="none")),
    "token-lowrank, one head": (
        "dinov2-registers",
        dict(predictor="token-lowrank", rank=4, token_lowrank=dict(shared_heads=True, channels=7)),
    ),
    "merged": ("deit", dict(keep=0.3, tokens=dict(keep=0.6, stages=(1,)))),
    "merged, token-lowrank": ("deit", dict(predictor="token-lowrank", rank=5, tokens=dict(keep=0.6, stages=(1,)))),
    "merged, tiles": ("deit", dict(granularity="tile", tile=(2, 2), tokens=dict(keep=0.5, stages=(1,)))),
    "evit": ("vit-avg-pool", dict(tokens=dict(way="evit", keep=0.5, stages=(1,)))),
    "evit-fused": ("deit", dict(tail="none", tokens=dict(way="evit-fused", keep=0.5, stages=(1,)))),
}


def calls(model, x):
    """Arguments of every sparse call of a forward pass: module, q, k, mask, tokens."""
    found = []
    with torch.inference_mode(), observe.watching_calls(model, lambda block, *call: found.append(call)):
        model.forward_features(x)
    return [call for call in found if isinstance(call[0], SparseAttention)]


def units(q):
    """Values of which the output says what each key was given: [B, H, N, d], the N-th unit vectors."""
    B, H, N, d = q.shape
    assert d >= N
    return torch.eye(N, d).expand(B, H, N, d)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_keys_and_weights_are_those_of_the_op(case, masked):
    family, how = CASES[case]
    model = grafted(family, **how)
    for module, q, k, _, tokens in calls(model, images(model)):
        B, H, N, d = q.shape
        mask = None
        if masked:
            mask = torch.randn(B, H, N, N, generator=torch.Generator().manual_seed(2))
            mask[..., 3] = -torch.inf
        spec = module.spec(N, tokens)
        with execution.sparse_form(model, "reference"), torch.inference_mode():
            out = module.attend(q, k, units(q), mask, tokens).view(B, N, H, d).transpose(1, 2)[..., :N]  # (B, H, N, N)
            size, place = (None, None) if tokens is None else (tokens.size, tokens.place)
            ranking, context = module.predictor(q, k, mask, tokens, spec).written(q, k), Context(mask, size, place)
            kept = selection.kept(ranking, context, spec)
            a, _ = selection.cells(ranking, context, spec)
            bias = selection.bias_of(mask, q)
            weight, tail = weights.weights(q, k, kept, a, bias, size, module.scale)
        assert (kept[:, :, spec.prefix :].sum(-1) == spec.budgets[0]).all() and kept[:, :, : spec.prefix].all()
        assert (weight[~kept] == 0).all()
        torch.testing.assert_close(weight.sum(-1) + tail, torch.ones(B, H, N))
        rest = out - weight  # what the tail spreads over the keys of its cells
        torch.testing.assert_close(rest.sum(-1), tail, atol=1e-5, rtol=1e-4)
        if spec.tail == "none":
            torch.testing.assert_close(out, weight, atol=1e-6, rtol=1e-4)
            if not masked:
                assert torch.equal(out > 0, kept)
        elif not masked:  # inside a cell every key has the same of it, times its size
            counted = torch.ones(B, N) if size is None else size
            each = rest / counted[:, None, None]
            for cell in range(int(a.max()) + 1):
                inside = (a == cell)[:, :, None].expand_as(each)
                high = each.masked_fill(~inside, -torch.inf).amax(-1)
                low = each.masked_fill(~inside, torch.inf).amin(-1)
                assert ((high - low < 1e-5) | ~inside.any(-1)).all()
            dropped = ~kept & (a[:, :, None] >= spec.prefix)
            assert (rest[dropped] > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_scores_keep_the_same_keys_as_the_op(data):
    """Scores of few different values: nearly every threshold is a tie."""
    h, w = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    P, H = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))
    N = P + h * w
    r, b = data.draw(st.integers(1, min(2, N))), data.draw(st.integers(1, N))
    tile = data.draw(st.sampled_from([(), (2, 2), (1, 3)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    q = torch.randint(-1, 2, (2, H, N, N), generator=generator).float()
    k = torch.randint(-1, 2, (2, H, N, N), generator=generator).float()
    spec = Spec.uniform(b, P, "none", (h, w), (1, 1), tile)
    size = None
    if data.draw(st.booleans()):
        size = torch.randint(1, 3, (2, N), generator=generator).float()
    scale = 0.5
    ranks = [r] * H
    values = torch.eye(N).expand(2, H, N, N)
    out = head_lowrank(q, k, values, None, None, None, size, None, ranks, scale, spec)
    ranking = head_ranking(q, k, None, None, size, ranks, scale).written(q, k)
    kept = selection.kept(ranking, Context(), spec)
    assert torch.equal(out.view(2, N, H, N).transpose(1, 2) > 0, kept)
    weight, _ = weights.weights(q, k, kept, None, None, size, scale)
    torch.testing.assert_close(out.view(2, N, H, N).transpose(1, 2), weight)
    for head in range(H):  # one head at a time gives the same
        assert torch.equal(selection.kept(ranking.head(head), Context(), spec)[:, 0], kept[:, head])


def test_all_scores_equal_keep_the_first_keys():
    model = grafted("deit", predictor="token-lowrank", rank=4)
    for module in sparse_modules(model).values():
        torch.nn.init.zeros_(module.predictor.w_up)
    for module, q, k, mask, tokens in calls(model, images(model)):
        spec = module.spec(q.shape[2], tokens)
        kept = selection.kept(module.predictor(q, k, mask, tokens, spec).written(q, k), Context(mask), spec)
        assert (kept[:, :, 1:, : spec.budgets[0]]).all() and not (kept[:, :, 1:, spec.budgets[0] :]).any()
