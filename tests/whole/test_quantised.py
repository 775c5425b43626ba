"""int8 after conversion: the sparse model goes on working, and nothing reads weights past the quantised layers."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from helpers.families import build, draw_importance, images
from sparsify.config import SparsityConfig, Tokens
from sparsify.nn import graft
from sparsify.nn.tokens import TokenState as Present

ONLY_PREFIX = Tokens(keep=(0.6, 0.0))  # the second block computes no patch row


def sparse(tokens=None, predictor="head-lowrank", keep=0.3):
    model = build("deit")
    settings = {"keep": keep, "rank": 8, "cells": (2, 2), "tokens": tokens, "predictor": predictor}
    return draw_importance(graft.graft(model, SparsityConfig(**settings))).requires_grad_(False)


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
@pytest.mark.parametrize("predictor", ["head-lowrank", "token-lowrank"])
@pytest.mark.parametrize("tokens", [None, ONLY_PREFIX])
def test_int8_is_near_the_float_model(tokens, predictor, config):
    model = sparse(tokens, predictor)
    quantised, x = copy.deepcopy(model), images(model)
    quantize_(quantised, config())
    assert type(quantised.blocks[1].attn.qkv.weight) is not nn.Parameter
    with torch.inference_mode():
        expected, found = model(x), quantised(x)
    assert found.shape == expected.shape and not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()


class Adapted(nn.Module):
    """A linear layer with something added, as adapters are; its weight alone is not what it computes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.more = inner, nn.Linear(inner.in_features, inner.out_features)
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x):
        return self.inner(x) + self.more(x)


@pytest.mark.parametrize("kind", ["plain", "int8", "adapted"])
def test_prefix_rows_alone_are_those_of_all_rows(kind):
    attn = sparse(ONLY_PREFIX, keep="dense").blocks[1].attn
    if kind == "int8":
        quantize_(attn, Int8WeightOnlyConfig())
    elif kind == "adapted":
        attn.qkv = Adapted(attn.qkv).requires_grad_(False)
    x = torch.randn(2, 20, 192, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(attn.prefix_rows(x, 1, Present(19)), attn(x)[:, :1], atol=1e-5, rtol=1e-4)
