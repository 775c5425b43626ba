"""What a user does with a model of each family: its own weights, a file, another image size, gradients, other inputs."""

import copy

import pytest
import safetensors.torch
import torch
from timm.models.naflexvit import batch_patchify

from helpers.families import FAMILIES, build, images, raise_attention
from helpers.op_calls import head_lowrank
from sparsify import profile
from sparsify.config import SparsityConfig
from sparsify.errors import UsageError
from sparsify.fit.calibrate.calibrate import calibrate
from sparsify.models import building, checkpoint, pretrained
from sparsify.models.building import describe
from sparsify.models.names import Source
from sparsify.nn import execution, graft, hosts
from sparsify.nn.attention import Execution, sparse_modules

NEW = [
    "eva",
    "eva02-clip",
    "dinov3",
    "rope-mixed",
    "rope-qk-norm-few-keys",
    "beit",
    "beit-both-biases",
    "naflexvit",
    "hybrid",
]
NEW = [family for family in NEW if family in FAMILIES]  # an older timm has fewer


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def sparse(dense, **settings):
    model, x = copy.deepcopy(dense), images(dense, 4)
    calibrate(model, SparsityConfig(**{"rank": 8, "cells": (2, 2), "spread": "none", **settings}), lambda: [x])
    return model


def source_of(family, **more):
    name, arguments = FAMILIES[family]
    return Source(name, name, name, {**arguments, "depth": 2, **more})


@pytest.fixture
def loaded(tmp_path):
    """A family's small dense model as the tool loads it from a user's checkpoint, and where that came from."""

    def load(family, img_size=None):
        source, side = source_of(family), 6 * hosts.stride(build(family))[0]
        frame = raise_attention(
            building.build(source.architecture, {**source.model_args, "num_classes": 7, "img_size": side}, None)
        )
        path = tmp_path / "own.safetensors"
        safetensors.torch.save_file({k: v.contiguous() for k, v in frame.state_dict().items()}, path)
        given = img_size or (None if frame.state_dict().keys() & {"pos_embed"} or "beit" in family else side)
        return pretrained.load(source, path, img_size=given), source, frame.eval()

    return load


@pytest.mark.parametrize("family", NEW)
def test_own_checkpoint_to_file_and_back(family, loaded, tmp_path):
    """Number of classes and image size are read off the checkpoint; the file rebuilds the same model."""
    dense, source, frame = loaded(family)
    x = images(dense)
    assert hosts.image_size(dense) == hosts.image_size(frame) and dense.num_classes == 7
    with torch.inference_mode():
        close(dense(x), frame(x))
    model, config = sparse(dense, keep=0.4), SparsityConfig(rank=8, cells=(2, 2), keep=0.4, spread="none")
    path = tmp_path / "model.safetensors"
    described = describe(dense, source)
    checkpoint.save(model, path, checkpoint.Header(described, config, {}, {}))
    again = checkpoint.load(path)
    assert hosts.image_size(again) == hosts.image_size(dense) and hosts.patch_grid(again) == (6, 6)
    with torch.inference_mode():
        assert torch.equal(again(x), model(x))
    assert checkpoint.digest_of(graft.dense_twin(again)) != ""


@pytest.mark.parametrize("predictor", ["head-lowrank", "token-lowrank"])
@pytest.mark.parametrize("family", NEW)
def test_another_image_size_equals_dense_at_that_size(family, predictor):
    dense = build(family)
    side = 8 * hosts.stride(dense)[0]
    model = sparse(dense, keep=1.0, predictor=predictor)
    try:
        graft.resize(model, side)
    except UsageError as error:
        assert "no other image size" in str(error) and "beit" in family  # timm before 1.0.31
        return
    hosts.set_image_size(dense, side, side)
    x = images(dense)
    assert x.shape[-1] == side and hosts.patch_grid(model) == (8, 8)
    with torch.inference_mode():
        close(model(x), dense(x))
    assert all(m.sparsity.grid == (8, 8) for m in sparse_modules(model).values())


@pytest.mark.parametrize("family", NEW)
def test_gradients_reach_every_parameter_that_the_dense_model_s_do(family):
    dense = build(family)
    model, x = sparse(dense, keep=0.4), images(dense)
    for each in (dense, model):
        each.train()(x).square().mean().backward()
    reached = {name for name, p in dense.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached <= found
    whole = sparse(dense.eval(), keep=1.0).train()
    dense.zero_grad(), whole.zero_grad()
    for each in (dense, whole):
        each.eval()(x).square().mean().backward()
    gradients = dict(dense.named_parameters())
    for name, p in whole.named_parameters():
        if "predictor" not in name and "attn." not in name and gradients[name].grad is not None:
            close(p.grad, gradients[name].grad, 1e-3)


@pytest.mark.parametrize("family", ["beit", "dinov3", "naflexvit-rope"])
def test_intermediates_classifier_and_state_dict_are_timms(family):
    dense = build(family)
    model, x = sparse(dense, keep=1.0, fold=False), images(dense)
    names = {name for name in model.state_dict() if ".predictor." not in name}
    assert names == set(dense.state_dict())
    with torch.inference_mode():
        for ours, theirs in zip(
            model.forward_intermediates(x, intermediates_only=True),
            dense.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            close(ours, theirs)
        close(model.forward_head(model.forward_features(x)), dense(x))
    twin = graft.dense_twin(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in dense.modules()]
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("predictor", ["head-lowrank", "token-lowrank"])
def test_beits_biases_are_part_of_logits_ranking_and_tail(predictor):
    """A bias that hides nothing: it decides which keys are kept, and how much a dropped key counts."""
    dense = build("beit")
    with torch.no_grad():
        for block in dense.blocks:
            block.attn.relative_position_bias_table.zero_()
            block.attn.relative_position_bias_table[60] = 6.0  # one offset
    model, x = sparse(dense, keep=0.2, predictor=predictor), images(dense)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for block in plain.blocks:
            block.attn.relative_position_bias_table.zero_()
    with torch.inference_mode():
        assert (model(x) - plain(x)).abs().max() > 1e-3
        error, least = (model(x) - dense(x)).abs().mean(), (plain(x) - dense(x)).abs().mean()
        assert error < 0.7 * least


@pytest.mark.parametrize("tail", ["none", "mean"])
def test_a_bias_that_hides_nothing_is_ranked_and_counted(tail):
    """By hand: the b highest of q.k scale + bias are kept; the mean key represents the others, e^bias times each."""
    H, N, d, P, b = 2, 10, 4, 1, 3
    q, k, v, bias = torch.randn(4, 1, H, N, max(N, d), generator=torch.Generator().manual_seed(3)).double().unbind(0)
    q, k, v, scale = q[..., :d], k[..., :d], v[..., :d], 0.3
    spec = (b, P, tail, [3, 3], [1, 1], [])
    found = head_lowrank(q, k, v, None, None, bias, None, None, [d] * H, scale, spec).unflatten(2, (H, d))
    logits = q @ k.mT * scale + bias
    for h in range(H):
        for i in range(N):
            kept = set(range(N)) if i < P else set(logits[0, h, i].topk(b).indices.tolist())
            weight, value = logits[0, h, i].exp(), v[0, h]
            numerator = sum(weight[j] * value[j] for j in kept)
            total = sum(weight[j] for j in kept)
            cells = [] if tail == "none" else [[0], list(range(1, N))]
            for cell in cells:
                mass = sum(bias[0, h, i, j].exp() for j in cell if j not in kept)
                if mass:
                    e = mass * (q[0, h, i] @ k[0, h, cell].mean(0) * scale).exp()
                    numerator, total = numerator + e * value[cell].mean(0), total + e
            close(found[0, i, h], numerator / total, 1e-9)


def test_the_tool_says_that_position_biases_are_the_references():
    model = sparse(build("beit"), keep=0.4)
    found = profile(model, repeats=1)
    assert found.backend.startswith("reference (this model adds position biases")
    assert all("cpu" not in choice["ms"] and choice["taken"] in ("sdpa", "reference") for choice in found.choices)
    with pytest.raises(UsageError, match="'cpu' cannot be used here: this model adds position biases"):
        execution.set_execution(model, Execution("cpu"))
    assert not hosts.biased(build("deit"))


@pytest.mark.parametrize("family", ["naflexvit", "naflexvit-rope"])
@pytest.mark.parametrize("predictor", ["head-lowrank", "token-lowrank"])
def test_patches_with_a_mask_are_the_image_they_came_from(family, predictor):
    """NaFlex input: 36 patches of one image, 20 of another and 16 that are padding; what is padding does not matter."""
    dense = build(family)
    model = sparse(dense, keep=1.0, predictor=predictor)
    few = sparse(dense, keep=0.3, predictor=predictor)
    patches = batch_patchify(images(dense), (16, 16))[0]  # (2, 36, 768)
    y, x = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    coord = torch.stack([y, x], -1).reshape(1, 36, 2).repeat(2, 1, 1)
    valid = torch.ones(2, 36, dtype=torch.bool)
    valid[1, 20:] = False
    with torch.inference_mode():
        close(model(patches, coord, valid), dense(patches, coord, valid))
        close(model(patches, coord, valid.fill_(True)), dense(images(dense)), 1e-3)
        valid[1, 20:] = False
        noisy = patches.clone()
        noisy[1, 20:] += 3
        close(few(noisy, coord, valid), few(patches, coord, valid))


def test_rotary_embedding_is_refused_by_attention_that_was_grafted_without():
    model = sparse(build("eva"), keep=0.4)
    attention = next(iter(sparse_modules(model).values()))
    with pytest.raises(ValueError, match="without rotary"):
        attention(torch.randn(1, 37, 96), rope=torch.randn(36, 64))


def test_targets_are_refused_for_hosts_without_token_stages(run, tmp_path):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"")
    code, _, err = run("convert", "naflexvit_base", "--token-keep", "0.5", "--weights", weights)
    assert code and "NaFlexVit" in err and "--token-keep" in err
