"""Forward passes on a GPU that is not there: no tensor is made elsewhere, and nothing waits for the device."""

import pytest
import torch

from helpers.fake_gpu import fake_gpu
from helpers.families import FAMILIES, LEAVING, build, images
from sparsify.config import SparsityConfig, TokenLowrank, Tokens
from sparsify.nn import graft
from sparsify.nn.attention import Execution, sparse_modules
from sparsify.nn.execution import set_execution
from sparsify.ops import attention, auto, backends, candidates, masked
from sparsify.ops.spec import Kind, Shape, Spec

KEEP = {"keep": 0.3, "rank": 4, "cells": (2, 2)}


def forward(model, shape, dtype=torch.float32):
    """On the fake GPU, all of the forward pass but its weights; what computed the sparse form."""
    set_execution(model, Execution())
    with torch.inference_mode():
        out = model(torch.empty(shape, device="cuda", dtype=dtype))
    assert out.device == torch.device("cuda:0")


@pytest.mark.parametrize("way", ["merge", "evit", "evit-fused"])
@pytest.mark.parametrize("importance", ["fitted", "attention"])
@pytest.mark.parametrize("triton", [True, False])
def test_the_stages_of_tokens_neither_wait_nor_leave_the_device(way, importance, triton, monkeypatch):
    tokens = Tokens(keep=0.5, stages=(1,), way=way, importance=importance)
    model = graft.graft(build("deit", depth=3), SparsityConfig(tokens=tokens, **KEEP)).requires_grad_(False)
    shape = images(model, 2).shape
    with fake_gpu(monkeypatch, model, triton=triton):
        forward(model, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig(keep=((0.1, 0.3, 0.5),), rank=((2, 3, 4),), cells=(((2, 2), (1, 2), (3, 3)),)),  # by head
        SparsityConfig(fold=False, tail="mean", **KEEP),
        SparsityConfig(predictor="token-lowrank", granularity="tile", tile=(2, 2), **KEEP),
        SparsityConfig(predictor="token-lowrank", token_lowrank=TokenLowrank(channels=4, coef_topk=3), **KEEP),
    ],
)
def test_sparse_attention_is_masked_and_neither_waits_nor_leaves_the_device(config, dtype, monkeypatch):
    model, called, attend = graft.graft(build("deit", depth=1), config).requires_grad_(False), [], masked.attend
    monkeypatch.setattr(masked, "attend", lambda *call: called.append(1) or attend(*call))
    shape = images(model, 2).shape
    with fake_gpu(monkeypatch, model.to(dtype)):
        forward(model, shape, dtype)
    assert called


BY_TIMM = {"dinov3", "dinov3-qkv-bias"}  # timm makes their rotary embedding on the CPU, in each call


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - BY_TIMM))
def test_every_family(family, monkeypatch):
    tokens = Tokens(keep=0.6, stages=(1,), importance="attention") if family in LEAVING else None
    model = graft.graft(build(family, depth=2), SparsityConfig(tokens=tokens, **KEEP)).requires_grad_(False)
    shape = images(model, 2).shape
    with fake_gpu(monkeypatch, model):
        forward(model, shape)


def test_a_look_at_values_fails_there(monkeypatch):
    """The tests above can fail: by a look, by a tensor on the CPU, and by a copy from it."""
    with fake_gpu(monkeypatch):
        x = torch.zeros(3, device="cuda")
        for wrong in (lambda: bool(x.any()), lambda: torch.arange(3), lambda: torch.tensor([1, 2], device="cuda")):
            with pytest.raises((AssertionError, RuntimeError)):
                wrong()


def test_images_are_masked_a_few_at_a_time_and_long_sequences_by_the_reference(monkeypatch):
    torch.manual_seed(0)
    model = graft.graft(build("deit", depth=1), SparsityConfig(**KEEP)).requires_grad_(False)
    (module,) = sparse_modules(model).values()
    x = torch.randn(5, 197, 192)
    q, k, v = module.qkv_heads(x)
    with torch.inference_mode():
        whole = module.sparse(q, k, v, None, None, module.spec(197), "masked")
        monkeypatch.setattr(backends, "MOST_MASKED", 2 * 3 * 197**2)
        rows, attend = [], masked._attend
        monkeypatch.setattr(masked, "_attend", lambda q, *rest: rows.append(len(q)) or attend(q, *rest))
        parts = module.sparse(q, k, v, None, None, module.spec(197), "masked")
    assert rows == [2, 2, 1]
    torch.testing.assert_close(parts, whole)
    with fake_gpu(monkeypatch):
        for N, path in ((278, "masked"), (279, "reference")):
            assert backends.resolve("auto", torch.empty(5, 3, N, 64, device="cuda")) == path
            assert backends.resolve("reference", torch.empty(5, 3, N, 64, device="cuda")) == "reference"


# ---- dense attention by each of torch's kernels ----

SHAPE = Shape(
    2, 3, 65, 16, torch.float16, "cuda:0", 0, False, "input", "masked", Kind("head-folded", 8, 4),
    Spec.uniform(5, 1, "clusters", (8, 8), (2, 2)),
)  # fmt: skip


def test_torchs_kernels_for_gpus_are_candidates_where_they_take_the_shape(monkeypatch):
    called = []

    def dense(path, q, k, v, mask, scale, precision, size):
        called.append(path)
        if path == "sdpa-cudnn" or (path == "sdpa-flash" and size is not None):
            raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(attention, "dense", dense)
    with fake_gpu(monkeypatch):
        found = candidates.make(SHAPE, lambda *call: None)
        merged = candidates.make(SHAPE._replace(merged=True), lambda *call: None)
        alone = candidates.make(SHAPE._replace(sparse=""), None)
    assert list(found) == ["masked", "sdpa", "sdpa-flash", "sdpa-efficient"]
    assert list(merged) == ["masked", "sdpa", "sdpa-efficient"]
    assert list(alone) == ["sdpa", "sdpa-flash", "sdpa-efficient"]


def test_the_named_kernel_computes(monkeypatch):
    q, k, v = torch.randn(3, 2, 3, 9, 16).unbind(0)
    expected = attention.dense("sdpa", q, k, v, None, 0.25, "input")
    torch.testing.assert_close(attention.dense("sdpa-flash", q, k, v, None, 0.25, "input"), expected)  # CPUs have one
    with pytest.raises(RuntimeError, match="No (available|viable)"):
        attention.dense("sdpa-cudnn", q, k, v, None, 0.25, "input")


def test_dense_blocks_are_decided_too(monkeypatch):
    asked = []

    class Chooser(auto.Chooser):
        def choose(self, shape, sparse):
            asked.append((shape, sparse))
            return auto.Choice("sdpa-cudnn", {}, 7, "always")

    tokens = Tokens(keep=0.5, stages=(1,), importance="attention")
    model = graft.graft(build("deit", depth=2), SparsityConfig(keep="dense", tokens=tokens)).requires_grad_(False)
    shape, paths = images(model, 2).shape, []
    dense = attention.dense
    monkeypatch.setattr(attention, "dense", lambda path, *call: paths.append(path) or dense("sdpa", *call))
    with fake_gpu(monkeypatch, model):
        set_execution(model, Execution(dense_fallback=True, choose=Chooser(), graph=True))
        with torch.inference_mode():
            model(torch.empty(shape, device="cuda"))
    (first, sparse), *_ = asked
    assert sparse is None and first.sparse == "" and first.graph and first.device == "cuda:0" and first.tokens == 37
    assert paths[0] == "sdpa-cudnn" and len(paths) == 2  # the last block computes the rows of its prefix alone
