"""MACs: the known totals of DeiT-Small, tiny nets counted by hand, and fvcore against the analytic count."""

import dataclasses

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from helpers import families
from sparsify.config import SparsityConfig, TokenLowrank
from sparsify.errors import SparsifyError
from sparsify.measure import analytic, macs
from sparsify.measure.profile import profile, verify
from sparsify.nn import attention, graft
from sparsify.nn.predictor import HeadLowrankPredictor, Predictor, TokenLowrankPredictor
from sparsify.ops.macs import dense_macs, sparse_macs
from sparsify.ops.selection import top_b
from sparsify.ops.spec import Spec

FAMILIES = {
    "deit": ("deit_tiny_patch16_224", {"img_size": 64}),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
    "deit3": ("deit3_small_patch16_224", {"img_size": 64}),
    "augreg": ("vit_tiny_patch16_224", {"img_size": (64, 96)}),
    "augreg-headless": ("vit_tiny_patch16_224", {"img_size": 64, "num_classes": 0}),
    "clip": ("vit_base_patch32_clip_224", {"img_size": 96}),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 64}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 70}),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", {"img_size": 28, "depth": 1}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 70}),
    "res-post-norm": ("vit_base_patch16_rpn_224", {"img_size": 64}),
    "rms-norm": ("aimv2_large_patch14_224", {"img_size": 56, "depth": 1}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 96}),
    "qk-norm": ("vit_tiny_patch16_224", {"img_size": 64, "qk_norm": True}),
    "scale-norm": ("vit_tiny_patch16_224", {"img_size": 64, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "gate": ("vit_tiny_patch16_224", {"img_size": 64, "attention": {"gated": True, "qkv_bias": True}}),
    "attn-dim": ("vit_tiny_patch16_224", {"img_size": 64, "attention": {"attn_head_dim": 32}}),
}
PLACED = """
    eva eva02-clip eva-post-norm dinov3 dinov3-qkv-bias perception-encoder rope-mixed rope-qk-norm-few-keys beit
    beit-both-biases naflexvit naflexvit-rope
""".split()
PLACED = [family for family in PLACED if family in families.FAMILIES]  # an older timm has fewer
CONFIGS = {
    "head-clusters": SparsityConfig(keep=0.2, rank=8),
    "head-unfolded-cells": SparsityConfig(keep=0.3, rank=4, fold=False, tail="cells", cells=(2, 2)),
    "token-mean": SparsityConfig(predictor="token-lowrank", rank=12, tail="mean"),
    "token-channels-tile": SparsityConfig(
        predictor="token-lowrank",
        rank=12,
        granularity="tile",
        tile=(2, 2),
        token_lowrank=TokenLowrank(channels=16, coef_topk=None, shared_projection=True),
    ),
}


def tiny(config: SparsityConfig, **options) -> VisionTransformer:
    """2x2 patches and a cls token: N = 5, P = 1, n = 4; H = 2 heads of d = 4; one block; 3 classes."""
    options = {"img_size": 4, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 2} | options
    return graft.graft(VisionTransformer(mlp_ratio=2, num_classes=3, **options).eval(), config)


def both(model: torch.nn.Module) -> list[tuple[macs.Counts, analytic.Analytic]]:
    """fvcore's and the analytic count of the sparse model and of its dense twin."""
    image, names = macs.image_shape(model), list(attention.sparse_modules(model))
    return [
        (macs.count(m, image, names), analytic.count(m, torch.zeros(1, *image)))
        for m in (model, graft.dense_twin(model))
    ]


@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig(keep=0.5, rank=2, cells=(2, 1)),
        SparsityConfig(keep=0.5, rank=2, fold=False, tail="mean"),
        SparsityConfig(keep=0.5, rank=3, predictor="token-lowrank", tail="cells", cells=(1, 2)),
    ],
    ids=lambda config: f"{config.predictor} {config.tail}",
)
def test_flop_counter_of_torch_sees_two_flops_a_mac(config):
    model = tiny(config).requires_grad_(False)
    image = macs.image_shape(model)
    counted = macs.count(model, image, list(attention.sparse_modules(model)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(3, *image))
    assert counter.get_flop_counts()["Global"][torch.ops.sparsify.sparse_attention] == 3 * 2 * counted.mhsa > 0


# ---- known totals ----


@pytest.fixture(scope="module")
def deit_small():
    model = timm.create_model("deit_small_patch16_224").eval()
    return profile(graft.graft(model, SparsityConfig(keep=0.1, rank=16, tail="clusters", cells=(4, 3))), measure=False)


def test_deit_small_dense_totals(deit_small):
    assert deit_small.mhsa_macs_dense == 357_663_744  # 12 blocks * 6 heads * 2 * 197 * 197 * 64
    assert deit_small.macs_dense == 4_608_338_304


def test_deit_small_at_keep_a_tenth_saves_70_percent_of_mhsa(deit_small):
    # b = ceil(19.7) = 20, n = 196, H d = 384, 12 blocks
    assert deit_small.kept_macs == 12 * 6 * 196 * (128 - 16) * 20
    assert deit_small.prefix_macs == 12 * 2 * 197 * 384
    assert deit_small.predictor_macs == 12 * 6 * 196 * 197 * 16
    # 12 cells and the cls key: logits and values; two assignments to 12 centres of 16 coordinates
    assert deit_small.tail_macs == 12 * 6 * 196 * (13 * 128 + 2 * 12 * 16)
    assert deit_small.mhsa_macs_sparse == 106_808_832
    assert deit_small.mhsa_macs_sparse <= 0.30 * deit_small.mhsa_macs_dense


def test_folded_whole_model_saves_what_the_mhsa_saves(deit_small):
    mhsa = deit_small.mhsa_macs_dense - deit_small.mhsa_macs_sparse
    assert deit_small.macs_dense - deit_small.macs_sparse == mhsa
    assert deit_small.param_count == deit_small.param_count_dense


@pytest.mark.parametrize("kind", ["token-lowrank", "unfolded", "folded"])
def test_deit_small_macs_per_kept_key(kind):
    def kept(b: int) -> int:
        spec = Spec.uniform(b, 1, "none", (14, 14), (1, 1))
        return 12 * sparse_macs((1, 6, 197, 64), 0, predictor.shared(6), [64] * 6, spec)["kept"]

    predictor: Predictor = HeadLowrankPredictor(64, (16,) * 6, kind == "folded")
    if kind == "token-lowrank":
        predictor = TokenLowrankPredictor(6, 64, 197, 1, 16, TokenLowrank().model_dump())

    slope = 12 * 6 * 196 * (128 - 16) if kind == "folded" else 1_806_336
    assert [kept(b) - kept(b - 1) for b in (2, 20, 197)] == [slope] * 3


def test_paper_table_is_a_line_over_the_budget():
    # Sparsifiner's MHSA of DeiT-S: slope 1.806336 M; 1.816 M of cls rows at b = 0; its predictor is 73.45 M of the rest
    part = sparse_macs((1, 6, 197, 64), 0, [0] * 6, [64] * 6, Spec.uniform(60, 1, "none", (14, 14), (1, 1)))
    assert 12 * (part["kept"] + part["prefix"]) == 1_806_336 * 60 + 12 * 2 * 197 * 384
    assert part["tail"] == 0


def test_counts_grow_with_the_batch():
    spec = Spec.uniform(2, 1, "clusters", (2, 2), (2, 1))
    one = sparse_macs((1, 2, 5, 4), 80, [1, 3], [1, 3], spec)
    assert sparse_macs((3, 2, 5, 4), 80, [1, 3], [1, 3], spec) == {k: 3 * v for k, v in one.items()}
    assert dense_macs((3, 2, 5, 4), (3, 2, 5, 4), (3, 2, 5, 4)) == 3 * 2 * 5 * 5 * 8


# ---- by hand ----
# Outside attention: conv 4 * 8 * 4 = 128; norm1, norm2, norm 3 * (5 * 8 * 5) = 600; qkv 5 * 8 * 24 = 960;
# proj 5 * 8 * 8 = 320; fc1 and fc2 2 * (5 * 8 * 16) = 1280; head 8 * 3 = 24. Sum 3312.
# Dense attention: 2 * 5 * 5 * 8 = 400. Prefix row: 2 * 1 * 5 * 8 = 80. keep 0.4: b = 2.
OUTSIDE, DENSE, PREFIX = 3312, 400, 80


@pytest.mark.parametrize(
    ("config", "kept", "predictor", "tail"),
    [
        # scores 2 * 4 * 5 * 2 = 80; kept 2 * 4 * 2 * (8 - 2) = 96
        ({"tail": "none"}, 96, 80, 0),
        ({"tail": "mean"}, 96, 80, 2 * 4 * (1 + 1) * 8),
        ({"tail": "cells", "cells": (2, 1)}, 96, 80, 2 * 4 * (2 + 1) * 8),
        ({"tail": "cells", "cells": (9, 9)}, 96, 80, 2 * 4 * (4 + 1) * 8),  # at most one cell for each patch
        # two assignments of 4 keys to 2 centres in r = 2 coordinates: 2 * 2 * 4 * 2 * 2 = 64
        ({"tail": "clusters", "cells": (2, 1)}, 96, 80, 192 + 64),
        ({"tail": "none", "granularity": "tile", "tile": (2, 2)}, 96, 80, 0),
        # projections of q and k: 2 * (2 * 5 * 4 * 2) = 160; all 8 products of a kept pair
        ({"tail": "none", "fold": False}, 128, 80 + 160, 0),
        ({"tail": "none", "keep": 1.0}, 2 * 4 * 5 * 6, 80, 0),
    ],
)
def test_tiny_head_lowrank_by_hand(config, kept, predictor, tail):
    model = tiny(SparsityConfig(**{"keep": 0.4, "rank": 2} | config))
    check_by_hand(model, kept, predictor, tail)


@pytest.mark.parametrize(
    ("knobs", "config", "predictor", "tail"),
    [
        # W_down k' 2 * 5 * 4 * 4 = 160; q' K_down' 2 * 4 * 4 * 4 = 128; up 2 * 4 * 5 * kappa
        ({"coef_topk": None}, {"tail": "none"}, 160 + 128 + 160, 0),
        ({"coef_topk": 2}, {"tail": "mean"}, 160 + 128 + 80, 128),
        ({"coef_topk": 9}, {"tail": "none"}, 160 + 128 + 160, 0),
        # c = 3: reduction 2 * (2 * 5 * 4 * 3) = 240; 2 * 5 * 3 * 4 = 120; 2 * 4 * 3 * 4 = 96; two assignments in d = 4
        ({"coef_topk": 2, "channels": 3}, {"tail": "clusters", "cells": (2, 1)}, 240 + 120 + 96 + 80, 192 + 128),
        ({"coef_topk": 2, "shared_projection": True}, {"tail": "none"}, 160 + 128 + 80, 0),
        ({"coef_topk": None, "coef_threshold": 0.5, "basis_threshold": 0.5}, {"tail": "none"}, 160 + 128 + 160, 0),
    ],
)
def test_tiny_token_lowrank_by_hand(knobs, config, predictor, tail):
    knobs = TokenLowrank(**knobs)
    model = tiny(SparsityConfig(predictor="token-lowrank", keep=0.4, rank=4, token_lowrank=knobs, **config))
    check_by_hand(model, 2 * 4 * 2 * 8, predictor, tail)


def check_by_hand(model, kept: int, predictor: int, tail: int) -> None:
    (counts, other), (dense, dense_other) = both(model)
    assert dict(counts.attention["blocks.0.attn"]) == {
        "kept": kept,
        "prefix": PREFIX,
        "predictor": predictor,
        "tail": tail,
    }
    assert (other.pairs, other.predictor, other.tail) == (kept + PREFIX, predictor, tail)
    assert counts.total == other.total == OUTSIDE + PREFIX + kept + predictor + tail
    assert dense.total == dense_other.total == OUTSIDE + DENSE


def test_tiny_without_prefix_tokens():
    model = tiny(SparsityConfig(keep=0.5, rank=2, tail="mean"), class_token=False, global_pool="avg")
    # N = n = 4, b = 2: kept 2 * 4 * 2 * 6 = 96, scores 2 * 4 * 4 * 2 = 64, one cell 2 * 4 * 1 * 8 = 64, no prefix row
    counts = both(model)[0][0]
    assert dict(counts.attention["blocks.0.attn"]) == {"kept": 96, "prefix": 0, "predictor": 64, "tail": 64}


def test_mask_has_the_non_zeros_that_are_counted():
    N, P, b = 17, 3, 4
    kept = top_b(torch.randn(2, 3, N, N), b)
    kept[:, :, :P] = True
    assert int(kept.sum()) == 2 * 3 * (P * N + (N - P) * b)


# ---- fvcore against the analytic count ----


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fvcore_equals_analytic(family, config):
    name, options = FAMILIES[family]
    options = {"depth": 2} | options
    replaced = options.pop("attention", None)
    model = timm.create_model(name, **options).eval()
    for block in model.blocks if replaced else ():  # timm's attn_layer takes classes only, no partial
        block.attn = Attention(model.embed_dim, num_heads=3, **replaced).eval()
    graft.graft(model, CONFIGS[config])
    for counts, other in both(model):
        assert not counts.unsupported
        verify(family, counts, other)
        assert counts.total == other.total > 0
        assert counts.mhsa == other.pairs + other.predictor + other.tail > 0


@pytest.mark.parametrize("config", ["head-clusters", "token-mean"])
@pytest.mark.parametrize("family", PLACED)
def test_fvcore_equals_analytic_where_places_enter_the_attention(family, config):
    model = families.build(family, patches=4)
    graft.graft(model, CONFIGS[config])
    for counts, other in both(model):
        assert not counts.unsupported
        verify(family, counts, other)
        assert counts.mhsa == other.pairs + other.predictor + other.tail > 0


def test_attention_pool_is_not_part_of_mhsa():
    model = graft.graft(timm.create_model("vit_base_patch16_siglip_224", img_size=64, depth=1).eval(), SparsityConfig())
    dense = both(model)[1][0]
    assert dense.mhsa == 12 * 2 * 16 * 16 * 64  # the block alone
    # the pool: one latent query over 16 tokens of width 768: q 768^2, kv 16 * 2 * 768^2, logits and values
    # 2 * 16 * 768, proj 768^2, norm 5 * 768, mlp 2 * 768 * 3072
    pool = (1 + 32 + 1) * 768**2 + 2 * 16 * 768 + 5 * 768 + 2 * 768 * 3072
    assert dense.by_module["attn_pool"] == pool


def test_dense_attention_without_the_fused_op_counts_the_same():
    model = tiny(SparsityConfig(rank=2))
    dense = graft.dense_twin(model)
    dense.blocks[0].attn.fused_attn = False
    counts = macs.count(dense, macs.image_shape(model), ["blocks.0.attn"])
    assert (counts.mhsa, counts.total) == (DENSE, OUTSIDE + DENSE)


def test_unknown_op_is_reported():
    model = tiny(SparsityConfig(rank=2))
    model.norm = torch.nn.Sequential(model.norm, Cumulative())
    found = profile(model, measure=False)
    assert dict(found.unsupported) == {"aten::cumsum": 1}


class Cumulative(torch.nn.Module):
    def forward(self, x):
        return x.cumsum(1)


@pytest.mark.parametrize("what", ["total", "pairs", "predictor", "tail"])
def test_disagreement_is_an_error(what):
    counts, other = both(tiny(SparsityConfig(rank=2)))[0]
    verify("sparse", counts, other)
    with pytest.raises(SparsifyError, match="report it"):
        verify("sparse", counts, dataclasses.replace(other, **{what: getattr(other, what) + 1}))


@pytest.mark.parametrize("fold", [True, False])
def test_ranks_by_head_are_counted_head_by_head(fold):
    """N=5, P=1, n=4, d=4, b=2; heads of rank 1 and 3: the sum R=4 counts."""
    counts, found = both(tiny(SparsityConfig(keep=0.4, rank=((1, 3),), fold=fold, tail="clusters", cells=(2, 1))))[0]
    assert counts.part("predictor") == found.predictor == 4 * 5 * 4 + (0 if fold else 2 * 5 * 4 * 4)
    assert counts.part("kept") == 4 * 2 * (2 * 2 * 4 - (4 if fold else 0))
    assert counts.part("tail") == found.tail == 2 * 4 * (2 + 1) * 2 * 4 + 2 * 4 * 2 * 4
    assert counts.total == found.total
