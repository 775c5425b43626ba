"""What a caller does with timm's own methods reaches the grafted attention too."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from helpers.families import build, grafted, images
from sparsify.config import SparsityConfig
from sparsify.nn import graft, hosts
from sparsify.nn.attention import sparse_modules


@pytest.mark.parametrize("predictor", ["head-lowrank", "token-lowrank"])
@pytest.mark.parametrize("family", ["deit", "beit", "eva02"])
def test_set_input_size_of_timm_is_resize(family, predictor):
    model = graft.graft(build(family, patches=6), SparsityConfig(keep=0.3, rank=6, predictor=predictor))
    side = 9 * hosts.stride(model)[0]
    ours, copied = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    graft.resize(ours, side)
    for timms in (model, copied):
        timms.set_input_size(img_size=side)
        assert hosts.patch_grid(timms) == (9, 9)
        x = images(timms)
        with torch.no_grad():
            assert torch.equal(timms(x), ours(x))
    assert {m.sparsity.grid for m in sparse_modules(model).values()} == {(9, 9)}


def test_a_rectangle_has_the_grid_and_the_cells_of_its_own_size():
    model = grafted("deit", patches=(8, 8))
    assert {m.sparsity.cells for m in sparse_modules(model).values()} == {((3, 3),)}
    model.set_input_size(img_size=(14 * 16, 20 * 16))
    # 9 cells of 65 tokens become 9 sqrt(197 * 281) / 65 = 32.6 of 281
    found = {(m.sparsity.grid, m.sparsity.cells) for m in sparse_modules(model).values()}
    assert found == {((14, 20), ((6, 5),))}
    twin = graft.dense_twin(model)
    assert "set_input_size" not in twin.__dict__
    twin.set_input_size(img_size=(64, 64))
    assert hosts.patch_grid(twin) == (4, 4) and hosts.patch_grid(model) == (14, 20)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_that_nobody_uses_is_freed_at_once(copied):
    gc.disable()
    try:
        model = copied(grafted("deit"))
        known = weakref.ref(model)
        del model
        assert known() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["deit", "beit", "eva02-unfused", "naflexvit"])
@pytest.mark.parametrize("predictor", ["head-lowrank", "token-lowrank"])
def test_no_image_in_a_batch_gives_no_row_of_logits(family, predictor):
    sparse = graft.graft(build(family), SparsityConfig(keep=0.3, rank=6, predictor=predictor))
    x = images(sparse)[:0]
    assert sparse(x).shape == (0, 10)
    with torch.inference_mode():
        assert sparse(x).shape == (0, 10)
