"""Sparse attention in the place of every host that is understood, and refusal of every other."""

import copy

import pytest
import timm
import torch

from helpers.families import FAMILIES, build, images
from sparsify.config import SparsityConfig
from sparsify.errors import UnsupportedModel, UsageError
from sparsify.fit.calibrate.calibrate import calibrate
from sparsify.nn import attention, graft, hosts
from sparsify.nn.attention import SparseAttention
from sparsify.ops.selection import rank_mask

PREDICTORS = ["head-lowrank", "token-lowrank"]


def sparse(family_model, **settings):
    """The model with fitted predictors, calibrated on its own random images; the dense original is left alone."""
    model = copy.deepcopy(family_model)
    x = images(model, 4)
    calibrate(model, SparsityConfig(**{"rank": 8, "cells": (2, 2), **settings}), lambda: [x])
    return model


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_one_equals_dense(family, predictor):
    """Through predictor, selection and sparse op with b = N: no short-cut."""
    dense = build(family)
    model = sparse(dense, keep=1.0, predictor=predictor, tail="clusters")
    x = images(dense)
    modules = attention.sparse_modules(model)
    assert len(modules) == len(dense.blocks) and all("predictor" in dict(m.named_children()) for m in modules.values())
    with torch.inference_mode():
        torch.testing.assert_close(model(x), dense(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_below_one_differs_and_the_dense_twin_does_not(family):
    dense = build(family)
    model, x = sparse(dense, keep=0.2), images(dense)
    with torch.inference_mode():
        expected = dense(x)
        assert (model(x) - expected).abs().max() > 1e-4  # the sparse op is really in the path
        torch.testing.assert_close(graft.dense_twin(model)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["deit", "dinov2-registers", "vit-avg-pool"])
def test_one_key_less_than_all_is_a_dense_softmax_without_the_lowest_scored_key(family):
    dense = build(family)
    N = hosts.num_prefix_tokens(dense) + 36
    model = sparse(dense, keep=(N - 1) / N, tail="none", spread="rank")
    block, P = model.blocks[0], hosts.num_prefix_tokens(dense)
    with torch.inference_mode():
        tokens = dense._pos_embed(dense.patch_embed(images(dense)))  # (B, N, C)
        x = block.norm1(dense.norm_pre(tokens))
        q, k, v = block.attn.qkv_heads(x)  # (B, H, N, d)
        scores = q @ (k * rank_mask([*block.attn.predictor.ranks, k.shape[-1]], k)[:-1]).mT
        logits = (q @ k.mT) * block.attn.scale
        logits[:, :, P:] = logits[:, :, P:].scatter(-1, scores[:, :, P:].argmin(-1, keepdim=True), -torch.inf)
        expected = block.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(block.attn(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask_kind", ["bool", "float"])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_attention_mask_equals_dense_at_keep_one_and_hides_keys_below(predictor, mask_kind):
    dense = build("deit")
    x = images(dense)
    allowed = torch.ones(1, 1, 1, 37, dtype=torch.bool)
    allowed[..., 20:] = False
    mask = (
        allowed
        if mask_kind == "bool"
        else torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, -torch.inf)
    )
    with torch.inference_mode():
        full = sparse(dense, keep=1.0, predictor=predictor)
        torch.testing.assert_close(
            full.forward_features(x, attn_mask=mask), dense.forward_features(x, attn_mask=mask), atol=1e-4, rtol=1e-4
        )
        few = sparse(dense, keep=0.2, predictor=predictor)
        changed = x.clone()
        tokens = few.forward_features(x, attn_mask=mask)
        changed[..., 64:, :] += 1.0  # patches 24 and up: hidden ones
        torch.testing.assert_close(few.forward_features(changed, attn_mask=mask)[:, :20], tokens[:, :20])


def test_timm_api_goes_on_working():
    dense = build("deit")
    model, x = sparse(dense, keep=0.5), images(dense)
    with torch.inference_mode():
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), model(x))
        assert [t.shape for t in model.forward_intermediates(x, intermediates_only=True)] == [(2, 192, 6, 6)] * 2
    assert model.get_classifier() is model.head and model.pretrained_cfg["architecture"] == "deit_tiny_patch16_224"
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)


def test_model_trains_in_half_precision_autocast_too():
    model = sparse(build("deit"), keep=0.5).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(images(model)).square().mean().backward()
    gradients = [p.grad for p in attention.sparse_modules(model)["blocks.0.attn"].parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert model.to(torch.bfloat16).eval()(images(model).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("family,folded", [("deit", True), ("gated", True), ("qk-norm", False)])
def test_predictor_is_folded_exactly_where_no_norm_or_rotation_follows(family, folded):
    model = sparse(build(family), keep=0.5)
    for module in attention.sparse_modules(model).values():
        assert module.predictor.folded is folded and bool(list(module.predictor.parameters())) is not folded


def test_unfolded_and_folded_keep_the_same_keys():
    dense = build("deit")
    x = images(dense)
    with torch.inference_mode():
        outs = [sparse(dense, keep=0.3, spread="none", fold=fold)(x) for fold in (True, False)]
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("size", [160, (96)])
def test_another_image_size_equals_dense_at_that_size(predictor, size):
    dense = build("deit", patches=8)
    model = sparse(dense, keep=1.0, predictor=predictor)
    graft.resize(model, size)
    dense.set_input_size(img_size=(size, size))
    x = images(dense)
    assert x.shape[-1] == size
    with torch.inference_mode():
        torch.testing.assert_close(model(x), dense(x), atol=1e-4, rtol=1e-4)


def test_another_image_size_has_the_cells_that_a_conversion_at_that_size_has():
    model = sparse(build("deit", patches=14), keep=0.1, cells=None, spread="none")
    for side, cells in ((14, (4, 3)), (24, (5, 4)), (37, (6, 5)), (14, (4, 3))):
        graft.resize(model, 16 * side)
        assert {m.sparsity.cells for m in attention.sparse_modules(model).values()} == {(cells,)}


@pytest.mark.parametrize(
    "name,named",
    [
        ("swin_tiny_patch4_window7_224", "WindowAttention"),
        ("vit_relpos_small_patch16_224", "RelPosAttention"),
        ("samvit_base_patch16", "Attention"),
        ("xcit_nano_12_p16_224", "Attention"),
        ("cait_xxs24_224", "Attn"),
        ("resnet18", "ResNet"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
    ],
)
def test_other_attention_is_refused_by_its_name(name, named):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModel, match=named) as caught:
        hosts.supported_attentions(model, name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_subclass_of_a_supported_attention_is_refused():
    class MyAttention(timm.layers.Attention):
        pass

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, attn_layer=MyAttention)
    with pytest.raises(UnsupportedModel, match="MyAttention"):
        graft.graft(model, SparsityConfig())
    assert not any(isinstance(m, SparseAttention) for m in model.modules())


def test_lists_must_fit_the_depth():
    with pytest.raises(UsageError, match="3 values.*2 blocks"):
        graft.graft(build("deit"), SparsityConfig(keep=(0.1, 0.2, 0.3)))


def test_keep_per_block_is_used():
    model = sparse(build("deit"), keep=(0.2, 0.7), rank=8, spread="none")
    assert [m.sparsity.keeps for m in attention.sparse_modules(model).values()] == [(0.2,), (0.7,)]
