"""Derivatives of every kind are exact, whatever computes the forward pass: those of dense attention, or of the reference."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.families import build, images
from helpers.op_calls import head_lowrank, op
from sparsify.config import SparsityConfig
from sparsify.nn import graft
from sparsify.nn.attention import Execution
from sparsify.nn.execution import set_execution
from sparsify.ops import attention, backends

BACKENDS = ["cpu", "masked", "reference"]


def forward_mode(f, x, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


def penalty(f, x, t):
    """The gradient of a gradient penalty, by autograd.grad."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), x)[0]


def backward(f, x, t):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    return x.grad


WAYS = {
    "grad": lambda f, x, t: torch.func.grad(lambda x: f(x).square().sum())(x),
    "a gradient of each image": lambda f, x, t: torch.func.vmap(
        torch.func.grad(lambda one: f(one[None]).square().sum())
    )(x),
    "torch.func.jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "jacfwd": lambda f, x, t: torch.func.jacfwd(lambda s: f(x + s * t))(torch.zeros(())),
    "forward mode": forward_mode,
    "autograd.functional.jvp": lambda f, x, t: torch.autograd.functional.jvp(f, x, t)[1],
    "autograd.functional.hvp": lambda f, x, t: torch.autograd.functional.hvp(lambda x: f(x).square().sum(), x, t)[1],
    "forward over reverse": lambda f, x, t: torch.func.jvp(torch.func.grad(lambda x: f(x).square().sum()), (x,), (t,))[
        1
    ],
    "penalty": penalty,
    "penalty, backward": backward,
}


def near(found, expected):
    """To the rounding of float32."""
    return float((found - expected).norm()) <= 2e-5 * float(expected.norm())


@pytest.fixture(scope="module")
def dense():
    return build("deit", patches=4)


@pytest.fixture(params=BACKENDS)
def sparse(request, dense, monkeypatch):
    """keep -> a sparse model of `dense`, computed by each backend."""
    if request.param == "masked":
        monkeypatch.setattr(backends, "not_built", lambda: "no kernels in this test")
    elif request.param == "cpu" and (reason := backends.not_built()):
        pytest.skip(f"no CPU kernels here: {reason}")

    def model(keep):
        made = graft.graft(copy.deepcopy(dense), SparsityConfig(keep=keep, rank=8, cells=(2, 2)))
        set_execution(made, Execution("auto" if request.param == "masked" else request.param))
        return graft.freeze_predictors(made)

    return model


def all_of(model):
    x = images(model)
    t = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no derivative of a derivative
        return {name: way(model, x, t) for name, way in WAYS.items()}


def test_all_keys_kept_they_are_those_of_the_dense_model(dense, sparse):
    found, expected = all_of(sparse(1.0)), all_of(dense)
    assert {name for name in WAYS if not near(found[name], expected[name])} == set()


def test_some_keys_kept_they_are_those_of_the_reference_inline(sparse, monkeypatch):
    found = all_of(sparse(0.3))
    monkeypatch.setattr(attention, "_path", lambda *_: "inline")
    expected = all_of(sparse(0.3))
    assert {name for name in WAYS if not near(found[name], expected[name])} == set()


def test_a_dense_block_keeps_its_derivative_in_forward_mode(dense):
    """Without gradients its own kernel computes, which knows no tangents."""
    made = graft.graft(copy.deepcopy(dense), SparsityConfig(keep=("dense", 1.0), rank=8)).requires_grad_(False)
    x = images(dense)
    with sdpa_kernel(SDPBackend.MATH):
        found, expected = (torch.func.jvp(model, (x,), (x,))[1] for model in (made, dense))
    assert near(found, expected)


@pytest.mark.parametrize("tail", ["none", "mean", "cells", "clusters"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("prefix", [1, 2])
def test_the_ops_gradient_is_differentiable_where_queries_and_keys_depend_on_each_other(prefix, backend, tail):
    N = prefix + 16
    q, v = torch.randn(2, 2, 3, N, 8, generator=torch.Generator().manual_seed(0))
    spec = (5, prefix, tail, (4, 4), (2, 2), ())

    def by(call):
        def f(q):
            k = q.roll(1, -1) * q.mean()
            size = torch.arange(1.0, 1 + 2 * N).view(2, N)
            return head_lowrank(q, k, v, None, None, None, size, None, (4, 3, 8), 0.3, spec, backend, call=call)

        return f

    expected = penalty(by(lambda *a: attention.reference.attend(*a[:6])), q, None)
    assert all(near(penalty(by(call), q, None), expected) for call in (op, attention.attention))


def test_the_op_itself_refuses_forward_mode_instead_of_losing_it():
    q, k, v = torch.randn(3, 1, 1, 5, 4, generator=torch.Generator().manual_seed(0))

    def f(q):
        return head_lowrank(q, k, v, None, None, None, None, None, (2,), 0.5, (2, 1, "mean", (2, 2), (1, 1), ()))

    def tangent(f):
        return lambda q: torch.func.jvp(f, (q,), (q,))[1]

    inside, outside = tangent(torch.compile(f, backend="eager")), torch.compile(tangent(f), backend="eager")
    for way in (tangent(f), inside, outside):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            way(q)
