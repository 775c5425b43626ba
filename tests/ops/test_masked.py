"""Sparse attention in training: one masked dense call, and the kernels' own backward, against the reference's gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention
from torch.utils.checkpoint import checkpoint

from helpers.cpu_calls import ISA, TAILS, calls, heads, need, oracle, plain, require_kernels
from helpers.op_calls import head_lowrank, token_lowrank
from sparsify.nn.attention import Execution, SparseAttention, Sparsity
from sparsify.nn.predictor import HeadLowrankPredictor
from sparsify.ops import backends, masked, reference, tails
from sparsify.ops.attention import attention as attention_of
from sparsify.ops.cpu import kernels as cpu
from sparsify.ops.spec import Spec

MERGED = pytest.mark.parametrize("merged", [False, True])


@pytest.fixture
def kernels():
    require_kernels()


def leaves(call, dtype):
    return [t.detach().to(dtype).clone().requires_grad_() for t in (call.q, call.k, call.v)]


def gradients(out, inputs, seed=0):
    """Of a drawn weighting of the output, [B, N, H*d]."""
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, inputs, g)


def through(function, call, dtype):
    """Output and gradients of `masked.attend` or of the reference on the call's numbers."""
    q, k, v = leaves(call, dtype)
    row, col, features = (t.to(dtype) for t in call.coordinates())
    ranking = call.ranking._replace(row=row, col=col, features=features)
    out = function(q, k, v, ranking, call.context, call.spec)
    return out, gradients(out, (q, k, v))


def trained(call, precision="input", dtype=torch.float32):
    """Output and gradients of the kernels."""
    q, k, v = leaves(call, dtype)

    def by(q, k, v, op):
        return cpu.attention(q, k, v, call.ranking, call.context, call.spec, precision, op)

    out = cpu.trained(q, k, v, call.context, call.spec, by)
    return out, gradients(out, (q, k, v))


def assert_gradients(found, expected, call, g, part=2e-5):
    """Within rounding: relative to what the sums could be at most."""
    largest = [t.double().norm(dim=-1).amax() for t in (call.q, call.k, call.v, heads(g, call))]
    q, k, v, g = largest
    part, N, scale = part + 1e-6 * q * k * call.scale, call.q.shape[2], call.scale
    for name, x, y, bound in zip(
        "qkv", found, expected, (2 * g * v * k * scale, 2 * N * g * v * q * scale, N * g), strict=True
    ):
        excess = (x.double() - y.double()).abs().amax()
        assert bool(excess <= part * bound + 1e-30), (
            f"gradient of {name}: off by {excess:.2g}, {part * bound:.2g} allowed"
        )


@settings(max_examples=80, deadline=None)
@given(calls(merged=True, most=7), st.sampled_from([torch.float64, torch.float32]))
def test_masked_attention_is_the_reference(call, dtype):
    out, grads = through(masked.attend, call, dtype)
    expected, wanted = through(reference.attend, call, dtype)
    double = dtype == torch.float64
    top = float(expected.detach().abs().max())
    torch.testing.assert_close(out, expected, atol=(1e-9 if double else 1e-3) * top, rtol=0)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert_gradients(grads, wanted, call, torch.ones_like(out) * 4, 1e-12 if double else 2e-5)


@MERGED
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("budget", [1, 20, 197])
def test_masked_attention_and_its_gradients_at_model_size(tail, budget, merged):
    call = plain(tail=tail, budget=budget)
    if merged:
        call = replace(call, size=torch.rand(1, 197) * 3 + 0.5, place=torch.randperm(196)[None])
    out, grads = through(masked.attend, call, torch.float32)
    expected, wanted = through(reference.attend, call, torch.float32)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    for x, y in zip(grads, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5 * float(y.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_masked_attention_in_half_precision(dtype, autocast):
    call = plain(tail="clusters")
    call = replace(call, **{name: getattr(call, name).to(dtype) for name in "qkv"})
    expected, wanted = through(reference.attend, call, torch.float32)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out, grads = through(masked.attend, call, dtype)
    assert out.dtype == dtype
    for x, y in zip((out, *grads), (expected, *wanted), strict=True):
        assert float((x.detach().float() - y.detach()).norm() / y.detach().norm()) < 0.02


@pytest.mark.parametrize("tail", TAILS)
def test_nothing_dropped_has_finite_gradients_and_is_dense_attention(tail, kernels):
    call = plain(budget=197, tail=tail)
    dense = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v).transpose(1, 2).flatten(2)
    for out, grads in (through(masked.attend, call, torch.float32), trained(call)):
        torch.testing.assert_close(out, dense, atol=1e-4, rtol=1e-4)
        assert all(bool(g.isfinite().all()) for g in grads)


@ISA
@settings(max_examples=60, deadline=None)
@given(call=calls(merged=True, most=9))
def test_gradients_of_the_kernels_are_those_of_the_equation(call, isa):
    require_kernels()
    need(isa)
    _, kept, a = call.probe(isa)
    exact = replace(call, **dict(zip("qkv", leaves(call, torch.float64), strict=True)))
    expected, *_ = oracle(exact, kept, a)
    g = torch.randn(call.q.shape, generator=torch.Generator().manual_seed(1))  # (B, H, N, d)
    wanted = torch.autograd.grad(expected, (exact.q, exact.k, exact.v), g.double())
    _, keys, cells = call.kernel("probe_attention", isa, "input")
    found = torch.ops.sparsify_cpu.sparse_backward(
        g, *(t.contiguous() for t in (call.q, call.k, call.v)), keys, cells, call.size, call.scale, call.spec.budgets,
        call.spec.prefix, cpu.TAILS[call.spec.tail], cells_of(call), isa,
    )  # fmt: skip
    assert_gradients(found, wanted, call, g.transpose(1, 2).flatten(2))


def cells_of(call):
    grid = call.spec.grid if call.place is not None else tails.patch_grid(call.q.shape[2] - call.P, call.spec.grid)
    return [tails.TAILS[call.spec.tail].count(grid, cells) for cells in call.spec.cells]


@settings(max_examples=60, deadline=None)
@given(calls(merged=True, most=9, numbers=("normal", "zeros")))
def test_calls_of_the_kernels_with_gradients(call):
    require_kernels()
    out, grads = trained(call)
    assert torch.equal(out, call.out())
    _, kept, a = call.probe()
    exact = replace(call, **dict(zip("qkv", leaves(call, torch.float64), strict=True)))
    expected = oracle(exact, kept, a)[0].transpose(1, 2).flatten(2)
    assert_gradients(grads, gradients(expected, (exact.q, exact.k, exact.v)), call, torch.ones_like(out) * 4)


@MERGED
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tile", [(), (4, 4)])
def test_gradients_of_the_kernels_at_model_size(tail, tile, merged, kernels):
    call = plain(B=2, tail=tail, tile=tile)
    if merged:
        call = replace(call, size=torch.rand(2, 197) * 3 + 0.5)
    out, grads = trained(call)
    expected, wanted = through(reference.attend, call, torch.float32)
    for x, y in zip((out, *grads), (expected, *wanted), strict=True):
        x, y = x.detach(), y.detach()
        assert float((x - y).norm() / y.norm()) < (1e-2 if tile else 1e-4)  # a tie of tiles may go the other way


def test_gradients_of_the_kernels_in_bfloat16(kernels):
    call = plain(tail="clusters", dtype=torch.bfloat16)
    out, grads = trained(call, dtype=torch.bfloat16)
    _, kept, a = call.probe()
    exact = replace(call, **dict(zip("qkv", leaves(call, torch.float64), strict=True)))
    expected = oracle(exact, kept, a)[0].transpose(1, 2).flatten(2)
    for x, y in zip(grads, gradients(expected, (exact.q, exact.k, exact.v)), strict=True):
        assert x.dtype == torch.bfloat16 and float((x.double() - y).norm() / y.norm()) < 0.005


def test_gradients_of_the_kernels_do_not_depend_on_threads(kernels):
    call, threads = plain(B=2, H=3, tail="clusters"), torch.get_num_threads()
    try:
        results = []
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            results.append(trained(call)[1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_a_backward_refuses_keys_and_cells_that_are_not_there(kernels):
    call = plain(tail="cells")
    _, keys, cells = call.kernel("probe_attention", 0, "input")
    arguments = (call.q.contiguous(),) * 4

    def backward(keys, cells, m=(12,), budgets=(20,)):
        tail = cpu.TAILS["cells"]
        return torch.ops.sparsify_cpu.sparse_backward(*arguments, keys, cells, None, 0.1, budgets, 1, tail, m, 0)

    backward(keys, cells)
    few = keys[:, :, 1:].contiguous()
    keys[:, 0, :, 12:] = -1
    backward(keys, cells, (12, 12), (12, 20))
    for bad in (
        (keys, cells), (keys + 197, cells, (12,), (12, 20)), (keys, cells - 1, (12,), (12, 20)), (keys, cells, (3,)),
        (few, cells), (keys, cells, (12, 3), (12, 20)), (keys, cells, (12,), (12, 21)), (keys, cells, (12,), (0, 20)),
        (keys, cells, (12,), (12, 20, 20)), (keys, cells, (), (12, 20)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="sparsify_cpu"):
            backward(*bad)


def attention(**execution):
    torch.manual_seed(0)
    sparsity = Sparsity((0.2,), 1, tails.TAILS["clusters"], (6, 6), ((3, 2),))
    sparse = SparseAttention(Attention(64, num_heads=2), HeadLowrankPredictor(32, (8, 8), True), sparsity)
    sparse.execution = Execution(**execution)
    return sparse


def step(sparse, **how):
    """Gradients of the parameters of one step."""
    x = torch.randn(2, 37, 64, generator=torch.Generator().manual_seed(1))
    out = checkpoint(sparse, x, use_reentrant=False) if how.get("again") else sparse(x)
    return torch.autograd.grad(out.square().sum(), list(sparse.parameters()))


@pytest.mark.parametrize("backend,way", [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference")])
def test_training_takes_the_way_of_the_backend(backend, way, kernels, monkeypatch):
    taken = []
    for module, name, word in (
        (cpu, "trained", "cpu"),
        (masked, "attend", "masked"),
        (reference, "attend", "reference"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, w=word: taken.append(w) or f(*a))
    sparse = attention(backend=backend)
    first = step(sparse)
    assert set(taken) == {way}
    if way != "cpu":
        return
    again = step(sparse, again=True)
    taken.clear()
    monkeypatch.setattr(backends, "not_built", lambda: "none here")
    wide = step(sparse)
    assert set(taken) == {"masked"}
    monkeypatch.setattr(backends, "MOST_MASKED", 0)
    long = step(sparse)
    assert set(taken) == {"masked", "reference"}
    for x, y, z, w in zip(first, again, wide, long, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(z, w, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(x, w, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "masked", "reference"])
def test_token_lowrank_in_training(backend):
    require_kernels()
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 2, 37, 8, generator=g, requires_grad=True) for _ in range(3))
    w_down, w_up = torch.rand(5, 37, generator=g), torch.randn(2, 5, 37, generator=g)
    spec = Spec.uniform(6, 1, "clusters", (6, 6), (3, 2))
    size = torch.rand(2, 37, generator=g) + 0.5

    def run(backend):
        arguments = (w_down, w_up, [None] * 4, None, size, None, 0.3, (0.4, 2), spec, backend)
        out = token_lowrank(q, k, v, *arguments, call=attention_of)
        return out, *gradients(out, (q, k, v))

    for x, y in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_masks_sizes_with_gradients_and_those_who_trace_take_the_op(kernels):
    q, k, v = (torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3))
    spec = Spec.uniform(2, 1, "mean", (2, 2), (1, 1))

    def run(mask=None, size=None, backend="cpu"):
        arguments = (None, None, mask, size, None, (2,), 0.5, spec, backend)
        return head_lowrank(q, k, v, *arguments, call=attention_of)

    assert "Trained" in run().grad_fn.name() or "Select" in run().grad_fn.name()
    size = torch.ones(1, 5, requires_grad=True)
    run(size=size).sum().backward()
    assert size.grad is not None
    hidden = torch.ones(5, 5, dtype=torch.bool).tril()
    assert run(mask=hidden, backend="masked").isfinite().all()
    assert backends.training("auto", q) == "cpu" and backends.training("auto", q, hidden) == "reference"
    compiled = torch.compile(attention(backend="cpu"), backend="eager", fullgraph=True)
    torch.testing.assert_close(step(compiled), step(attention(backend="reference")))
