"""Closed-form calibration: exact changes of basis, better than chance, deterministic, streaming."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.families import build, images
from sparsify.config import SparsityConfig
from sparsify.fit.calibrate.calibrate import calibrate, images_of
from sparsify.fit.calibrate.head_lowrank import Moments
from sparsify.fit.calibrate.token_lowrank import pooling
from sparsify.nn import attention
from sparsify.nn.predictor import resample
from sparsify.ops import backends


def fitted(seed_images: int = 4, **settings):
    model = build("deit")
    x = torch.randn(seed_images, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    return calibrate(model, SparsityConfig(**{"rank": 8, "cells": (2, 2), **settings}), lambda: x.split(2))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_basis_is_an_exact_change_of_basis(d, seed):
    """T_q T_k' = I even where the moments are singular."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, 3, 9, d, generator=g)
    k[..., 0] = 0
    m = Moments(3, d)
    m.add(q, k, 1)
    t_q, t_k, s = m.basis()
    torch.testing.assert_close(t_q @ t_k.mT, torch.eye(d, dtype=torch.float64).expand(3, -1, -1))
    assert (s[..., :-1] >= s[..., 1:] - 1e-9).all()


def test_queries_are_white_in_the_new_basis():
    """E[(T_q' q)(T_q' q)'] = I: squared key distances are expected squared logit differences."""
    q, k = torch.randn(2, 64, 1, 17, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0, 0.5, 0.2])
    m = Moments(1, 4)
    m.add(q, k, 0)
    t_q = m.basis()[0].float()
    projected = (q @ t_q).flatten(0, 2)
    torch.testing.assert_close(projected.T @ projected / len(projected), torch.eye(4), atol=1e-4, rtol=1e-4)


def test_rank_r_scores_explain_more_of_the_logits_than_any_r_plain_coordinates():
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=g)
    q, k = torch.randn(8, 1, 40, 16, generator=g) @ mix, torch.randn(8, 1, 40, 16, generator=g) @ mix.flip(0)
    m = Moments(1, 16)
    m.add(q, k, 0)
    t_q, t_k, _ = (t.float() for t in m.basis())
    k = k - k.mean(2, keepdim=True)
    exact = q @ k.mT
    lost = (exact - (q @ t_q[..., :4]) @ (k @ t_k[..., :4]).mT).square().mean()
    plain = min((exact - q[..., s : s + 4] @ k[..., s : s + 4].mT).square().mean() for s in range(0, 16, 4))
    assert lost < 0.5 * plain


@pytest.mark.parametrize("predictor", ["head-lowrank", "token-lowrank"])
def test_same_images_same_tensors_however_they_are_batched(predictor):
    first, again = (fitted(predictor=predictor).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("channels,shared_heads,shared", [(None, False, False), (8, True, False), (None, False, True)])
def test_token_lowrank_is_ridge_regression_of_the_attention(channels, shared_heads, shared):
    knobs = dict(channels=channels, shared_heads=shared_heads, shared_projection=shared)
    model = fitted(predictor="token-lowrank", token_lowrank=knobs, tail="none").model
    predictor = attention.sparse_modules(model)["blocks.1.attn"].predictor
    assert predictor.w_down.shape == (8, 37)
    assert (predictor.w_up is None) if shared else predictor.w_up.shape == (1 if shared_heads else 3, 8, 37)
    assert (predictor.w_q is None) if channels is None else predictor.w_q.shape == (8, 64)


def test_fitted_predictors_keep_more_attention_mass_than_a_random_choice():
    dense = build("deit")
    x = images(dense, 4)
    with torch.inference_mode():
        block = dense.blocks[0]
        h = block.norm1(dense._pos_embed(dense.patch_embed(x)))
        q, k, v = block.attn.qkv(h).reshape(4, 37, 3, 3, 64).permute(2, 0, 3, 1, 4)
        mass = ((q @ k.mT) * 64**-0.5).softmax(-1)[:, :, 1:]
    for predictor in ("head-lowrank", "token-lowrank"):
        model = copy.deepcopy(dense)
        calibrate(model, SparsityConfig(predictor=predictor, rank=8, keep=0.2, tail="none"), lambda: [x])
        attn = model.blocks[0].attn
        one_hot = torch.eye(37).expand(4, 3, -1, -1)  # as values: the output is the attention itself
        with torch.inference_mode():
            sq, sk, _ = attn.qkv_heads(h)
            values = torch.nn.functional.pad(one_hot, (0, 27))
            got = attn.sparse(sq, sk, values, None, None, attn.spec(37), "reference")
        kept = got.reshape(4, 37, 3, 64)[..., :37].transpose(1, 2)[:, :, 1:] > 0
        assert (mass * kept).sum(-1).mean() > 1.2 * 8 / 37


def test_a_list_of_ranks_is_taken_as_it_is():
    result = fitted(rank=(4, 12))
    assert result.config.rank == (4, 12) and result.images == 4


def test_ranks_by_head_are_used():
    model = fitted(rank=((4, 8, 16), (8, 8, 8)), fold=False).model
    a_q = attention.sparse_modules(model)["blocks.0.attn"].predictor.a_q
    assert a_q.shape == (3, 64, 16) and a_q[0, :, 3].any() and a_q[2, :, 15].any()


def test_memory_of_moments_does_not_grow_with_images():
    m = Moments(2, 4)
    sizes = set()
    for _ in range(3):
        m.add(torch.randn(5, 2, 9, 4), torch.randn(5, 2, 9, 4), 1)
        sizes.add(sum(t.numel() for t in vars(m).values() if torch.is_tensor(t)))
    assert len(sizes) == 1 and m.images == 15


def test_pooling_averages_cells_of_the_patch_grid():
    w = pooling(4, 1, (4, 4))
    assert w.shape == (4, 17) and not w[:, 0].any()
    torch.testing.assert_close(w.sum(1), torch.ones(4))
    assert w[0].nonzero().flatten().tolist() == [1, 2, 5, 6]  # the upper left quarter
    assert (pooling(7, 0, (2, 2)).sum(1) > 0).sum() == 4  # more rows than patches: the rest stay 0


def test_resampled_pooling_pools_the_other_grid():
    w = resample(pooling(4, 1, (4, 4)), 1, (4, 4), (8, 8))
    torch.testing.assert_close(w.sum(1), torch.ones(4), atol=0.02, rtol=0)
    grid = w[0, 1:].reshape(8, 8)
    assert grid[:4, :4].sum() > 0.9


def test_unfolded_basis_scores_like_the_folded_one():
    folded, unfolded = (fitted(spread="none", fold=f, keep=0.3).model for f in (True, False))
    x = images(folded)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), unfolded(x), atol=1e-4, rtol=1e-4)
    assert backends.BACKENDS[0] == "auto"


@pytest.mark.parametrize("keep,cells", [(0.02, (5, 4)), (0.05, (4, 4)), (0.1, (4, 3)), (0.25, (6, 5)), (1.0, (6, 5))])
def test_cells_follow_tokens_and_keep(keep, cells):
    """Of 197 tokens: 0.092, 0.08, 0.06, 0.15 and 1/6 of them, to the nearest grid."""
    assert SparsityConfig(keep=keep).with_cells(197).cells == cells
    assert SparsityConfig(keep=keep, cells=(2, 1)).with_cells(197).cells == (2, 1)


@pytest.mark.parametrize("tokens,cells", [(65, (2, 2)), (577, (5, 4)), (1370, (6, 5)), (4097, (8, 7))])
def test_cells_grow_with_the_root_of_the_tokens_beyond_197(tokens, cells):
    assert SparsityConfig(keep=0.1).with_cells(tokens).cells == cells


@pytest.mark.parametrize(
    ("n", "tokens", "expected"), [(128, 197, 128), (128, 577, 128), (128, 1370, 53), (128, 9000, 32), (8, 9000, 8)]
)
def test_fewer_large_images_hold_as_many_tokens(n, tokens, expected):
    assert images_of(n, tokens) == expected
