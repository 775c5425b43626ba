"""The fitted importance: a ridge regression of what later blocks read, against one written out with timm's own blocks."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.families import LEAVING, build, images
from sparsify.config import SparsityConfig, Tokens
from sparsify.errors import SparsifyError
from sparsify.fit.calibrate import token_importance
from sparsify.fit.calibrate.calibrate import calibrate, fit_importance
from sparsify.measure.profile import profile
from sparsify.models import checkpoint
from sparsify.nn import attention, projection, schedules, token_models
from sparsify.nn.importance import fitted_importance as fitted

TOKENS = Tokens(keep=0.6, stages=(1, 2, 3))


def weights_of(model):
    return [module.importance for module in attention.attention_modules(model).values()]


def calibrated(family="deit", tokens=TOKENS, batch=2, depth=3, **settings):
    model = build(family, depth=depth)
    x = images(model, 6)
    return calibrate(model, SparsityConfig(rank=4, cells=(2, 2), tokens=tokens, **settings), lambda: x.split(batch))


def by_hand(dense, x):
    """w and b of each block: timm's own blocks, one image and one head at a time, float64."""
    told, read = [], []
    with torch.no_grad():
        h = dense.norm_pre(dense._pos_embed(dense.patch_embed(x)))
        for block in dense.blocks:
            q, k, v = projection.heads(block.attn, block.norm1(h), None)
            a = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            d, added = q.shape[-1], 0
            for head in range(q.shape[1]):
                out = v[:, head] @ block.attn.proj.weight[:, head * d : (head + 1) * d].T  # (B, N, C)
                added = added + a[:, head, 0, :, None] * out
            read.append(added[:, 1:].norm(dim=-1))
            h = h + block.attn(block.norm1(h))
            patch = h[:, 1:]
            told.append(
                (patch - patch.mean(-1, keepdim=True)) / (patch.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            )
            h = h + block.mlp(block.norm2(h))
    found = []
    for i, f in enumerate(told):
        target = torch.stack(read[i:]).mean(0).log().flatten().double()
        f = torch.cat([f, torch.ones_like(f[..., :1])], -1).flatten(0, 1).double()
        gram = f.T @ f
        damp = token_importance.RIDGE * gram.diagonal()[:-1].mean() * torch.ones(len(gram), dtype=torch.float64)
        damp[-1] = 0
        found.append(torch.linalg.solve(gram + damp.diag(), f.T @ target))
    return found


def test_it_is_the_regression_of_what_later_blocks_read(monkeypatch):
    dense = build("deit", depth=3)
    expected = by_hand(dense, images(dense, 6))
    blocks, together = token_importance._blocks, set()

    def seen(dense, x, *more):
        together.add(len(x))
        return blocks(dense, x, *more)

    monkeypatch.setattr(token_importance, "_blocks", seen)
    for batch, held, most in ((2, token_importance.HELD, 2), (6, token_importance.HELD, 6), (6, 1, 1)):
        monkeypatch.setattr(token_importance, "HELD", held)
        together.clear()
        for own, other in zip(weights_of(calibrated(batch=batch).model), expected, strict=True):
            torch.testing.assert_close(own.double(), other, atol=1e-3, rtol=1e-3)
        assert together == {most}


def test_the_same_images_give_the_same_tensors():
    one, two = (weights_of(calibrated().model) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("family", LEAVING)
def test_every_family(family):
    """Before tokens leave and where some do; the count of MACs agrees with the analytic one."""
    model = calibrated(family, Tokens(keep=(0.6, 0.5)), depth=2).model
    assert all(w is not None and w.isfinite().all() and w[:-1].abs().max() > 0 for w in weights_of(model))
    x = images(model)
    with torch.no_grad():
        out = model(x)
        model.blocks[0].attn.importance.zero_()
        assert out.isfinite().all() and not torch.equal(model(x), out)
    assert profile(model, measure=False).stage_macs > 0


def test_only_blocks_with_a_stage_have_it():
    assert [w is None for w in weights_of(calibrated(tokens=Tokens(keep=0.5, stages=(2,))).model)] == [
        True,
        False,
        True,
    ]
    assert weights_of(calibrated(tokens=Tokens(keep=(1.0, 0.5, 0.0))).model)[2] is None
    assert weights_of(calibrated(tokens=Tokens(importance="attention", stages=(1,))).model) == [None] * 3
    assert weights_of(calibrated(tokens=None).model) == [None] * 3


def test_a_search_measures_it_and_what_is_applied_keeps_it():
    found = calibrated(tokens=None)
    fit_importance(found.model, lambda: images(found.model, 6).split(3))
    assert all(w is not None for w in weights_of(found.model))
    other = schedules.applied(found.model, found.config.model_copy(update={"tokens": Tokens(keep=(0.5, 1.0, 1.0))}))
    assert weights_of(other)[0] is weights_of(found.model)[0] and weights_of(other)[1:] == [None, None]
    assert all(w is not None for w in weights_of(found.model))


def test_it_is_told_in_float32_under_autocast_and_counts_the_size():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 5, 8, generator=g, requires_grad=True), torch.randn(9, generator=g)
    size = torch.rand(2, 5, generator=g) + 1
    with torch.autocast("cpu", torch.bfloat16):
        I = fitted(x, w, size, 0)
    assert I.dtype == torch.float32 and not I.requires_grad
    torch.testing.assert_close(I, fitted(x, w, None, 0) * size)
    assert (fitted(x, w - 1e4, None, 0) > 0).all()


def test_files(tmp_path):
    """It is in the file; one whose header does not know the word goes by attention, as it did."""
    made, path = calibrated(), tmp_path / "new.safetensors"
    architecture = {
        "architecture": "deit_tiny_patch16_224",
        "model_args": {"depth": 3, "img_size": 96, "num_classes": 10},
        "pretrained_cfg": {},
    }
    checkpoint.save(made.model, path, checkpoint.Header(architecture, made.config, {}, {}))
    loaded, x = checkpoint.load(path), images(made.model)
    with torch.no_grad():
        assert torch.equal(loaded(x), made.model(x))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(loaded), weights_of(made.model), strict=True))

    with safe_open(path, "pt") as file:
        meta = file.metadata()
    config = json.loads(meta["sparsify.config"])
    del config["tokens"]["importance"]
    tensors = {name: t for name, t in load_file(path).items() if not name.endswith("attn.importance")}
    meta["sparsify.config"] = json.dumps(config, sort_keys=True)
    del meta["sparsify.sha256"]
    meta["sparsify.sha256"] = checkpoint._digest(meta, tensors)
    old = tmp_path / "old.safetensors"
    save_file(tensors, old, metadata=meta)
    assert checkpoint.read_header(old).config.tokens.importance == "attention"
    assert weights_of(checkpoint.load(old)) == [None] * 3
    assert len(list(token_models.stages(checkpoint.load(old)))) == 3


def test_an_unknown_kind_is_refused_in_one_line():
    from sparsify.config import validate

    with pytest.raises(SparsifyError, match="^option tokens.importance: expected 'fitted' or 'attention'"):
        validate(SparsityConfig, {"tokens": {"importance": "magic"}}, "option")
