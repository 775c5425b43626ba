"""The Triton kernels against their PyTorch references on the CPU: tests of a process of their own (`tests/ops/test_gpu.py`).

With TRITON_INTERPRET=1 Triton's interpreter computes on the CPU, one program after the other, in float32 and float16 (its
bfloat16 products are wrong); it shows no races. Without, the GPU computes. New tensors are filled with NaN, so that whatever
a kernel does not write is seen.
"""

import os
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.families import build, draw_importance, images
from sparsify.config import SparsityConfig, Tokens
from sparsify.nn import graft, importance, merging
from sparsify.nn.tokens import WAYS, TokenStage, TokenState, ranking
from sparsify.ops.attention import dense
from sparsify.ops.gpu import attention, tokens

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = st.sampled_from([torch.float32, torch.float16])
LEAST = importance.TINY


def drawn(examples):
    """The same cases every time: choices that rounding decides may differ between two implementations."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate])


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(op, *arguments):
    """What an op gives on `DEVICE`, on the CPU."""
    found = op(*(each.to(DEVICE) if isinstance(each, torch.Tensor) else each for each in arguments))
    return found.cpu() if isinstance(found, torch.Tensor) else tuple(each.cpu() for each in found)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


def to_last_bit(found, expected):
    """As close as float32 means of dtype's own numbers, rounded to it."""
    close(found, expected, 1e-5 if found.dtype == torch.float32 else 1e-3)


@st.composite
def states(draw, counts=st.integers(2, 40)):
    """Tokens x [B, P + n, C], importance [B, n], sizes and places or None, and P; m < n tokens are to remain.

    In half of the cases many tokens and many importances are equal, and all cosines, costs and means of two are exact.
    """
    B, P, n = draw(st.integers(1, 2)), draw(st.integers(0, 3)), draw(counts)
    m, dtype = draw(st.integers(1, n - 1)), draw(DTYPES)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    if draw(st.booleans()):
        C, kinds = draw(st.sampled_from([16, 64])), draw(st.integers(1, 8))
        x = torch.randint(2, (kinds, C), generator=g).mul(2).sub(1)[torch.randint(kinds, (B, P + n), generator=g)]
        I = 2.0 ** torch.randint(-2, 2, (B, n), generator=g)
    else:
        x, I = (
            torch.randn(B, P + n, draw(st.sampled_from([16, 24, 40, 80, 132])), generator=g),
            torch.rand(B, n, generator=g),
        )
    size = 1 + 4 * torch.rand(B, P + n, generator=g) if draw(st.booleans()) else None
    place = torch.rand(B, 2 * n, generator=g).argsort(1)[:, :n].sort(1).values if draw(st.booleans()) else None
    return x.to(dtype), I, size, place, P, m


# ---- kernels ----


MANY = st.integers(257, 300)
"""Tokens that are more than one block in every loop of a kernel."""


@drawn(30)
@given(states())
def test_a_round_of_merging(state):
    check_round(state)


@drawn(4)
@given(states(MANY))
def test_a_round_of_merging_of_many_tokens(state):
    check_round(state)


def check_round(state):
    x, I, size, place, P, m = state
    count = merging.candidates(I.shape[1], m)
    new_x, new_I, new_size, new_place, group = run(tokens.merge_tokens, x, I, size, place, P, m, count)
    keep, expected = merging.matching(x[:, P:], I, m)
    assert torch.equal(group, expected)
    assert torch.equal(new_place, keep if place is None else place.gather(1, keep))
    assert torch.equal(new_x[:, :P], x[:, :P])
    to_last_bit(new_x[:, P:], merging.weighted_mean(x[:, P:], I, group, m))
    close(new_I, merging.group_sums(I, group, m))
    close(new_size, TokenStage("merge", 1, P).sizes(size, I, group, m))
    assert_alone_unchanged(x[:, P:], new_x[:, P:], group)


def assert_alone_unchanged(x, new_x, group):
    """Of tokens x [B, n, C] those that are alone in their group are as they were, in new_x [B, m, C]."""
    alone = ((group.unsqueeze(1) == group.unsqueeze(2)).sum(1) == 1) & (group >= 0)  # (B, n)
    assert torch.equal(new_x.gather(1, group.clamp_min(0).unsqueeze(-1).expand_as(x))[alone], x[alone])


@drawn(20)
@given(st.one_of(states(), states(), states(MANY)), st.booleans())
def test_a_stage_of_evit(state, fuse):
    x, I, _, place, P, m = state
    new_x, new_place, group = run(tokens.choose_tokens, x, I, place, P, m, fuse)
    keep, expected = ranking(I, m, fuse)
    assert torch.equal(group, expected)
    assert torch.equal(new_place, keep if place is None else place.gather(1, keep))
    assert torch.equal(new_x[:, :P], x[:, :P])
    to_last_bit(new_x[:, P:], merging.weighted_mean(x[:, P:], I, group, m + fuse))
    assert_alone_unchanged(x[:, P:], new_x[:, P:], group)


@drawn(20)
@given(st.data(), st.integers(1, 50), st.integers(0, 3), DTYPES)
def test_fitted_importance(data, n, P, dtype):
    C, g = data.draw(st.sampled_from([16, 96, 192, 384])), torch.Generator().manual_seed(n)
    x, weights = 3 * torch.randn(2, P + n, C, generator=g).to(dtype), torch.randn(C + 1, generator=g) / C**0.5
    size = 1 + torch.rand(2, P + n, generator=g) if data.draw(st.booleans()) else None
    found = run(tokens.fitted_importance, x, weights, size, P, LEAST)
    close(found, importance.fitted_importance(x, weights, size, P))
    assert (run(tokens.fitted_importance, x, weights - 1e4, size, P, LEAST) >= LEAST).all()


@st.composite
def heads(draw, rows=st.integers(2, 200)):
    """q, k, v [B, H, N, d] as `qkv` gives them, and sizes [B, N]."""
    B, H, N, d = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(rows),
        draw(st.sampled_from([32, 64, 72, 80, 96, 128])),
    )
    g = torch.Generator().manual_seed(N)
    q, k, v = torch.randn(B, N, 3, H, d, generator=g).to(draw(DTYPES)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, 1 + 9 * torch.rand(B, N, generator=g)


@drawn(20)
@given(heads(), st.integers(0, 2), st.booleans(), st.data())
def test_importance_by_attention(drawn_heads, rows, sized, data):
    q, k, _, size = drawn_heads
    P, size = data.draw(st.integers(rows, q.shape[2] - 1) if rows < q.shape[2] else st.just(0)), size if sized else None
    found = run(tokens.attention_importance, q, k, size, 0.2, rows, P, LEAST)
    close(found, importance.attention_importance(q, k, 0.2, size, rows, P))


@drawn(12)
@given(heads(st.one_of(st.integers(1, 200), st.just(520))), st.data())
def test_attention_over_tokens_of_different_sizes(drawn_heads, data):
    q, k, v, size = drawn_heads
    q, scale = q[:, :, : data.draw(st.sampled_from([1, q.shape[2]]))], data.draw(st.sampled_from([0.05, 0.2]))
    found = run(attention.sized_attention, q, k, v, size, scale)
    expected = dense("sdpa", q.float(), k.float(), v.float(), None, scale, "input", size)
    # weights and values are float16; a GPU multiplies float32 in tf32 here, which no model does (`attention.takes`)
    close(found, expected, 1e-5 if INTERPRETED and q.dtype == torch.float32 else 3e-3)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_stays_in_its_image_and_picks_tokens_that_exist():
    g = torch.Generator().manual_seed(0)
    x, I = torch.randn(3, 30, 24, generator=g), torch.rand(3, 30, generator=g)
    x[0, 3], x[0, 4, 5], I[1, 4:9], I[1, 9], x[1, 20] = torch.nan, torch.inf, torch.nan, torch.inf, 0
    for m in (1, 12):
        found = run(tokens.merge_tokens, x, I, None, None, 0, m, merging.candidates(30, m))
        place, group = found[3:]
        assert (place.diff(dim=1) > 0).all() and place.min() >= 0 and place.max() < 30
        assert torch.equal(group.gather(1, place), torch.arange(m).expand(3, m)) and group.max() < m
        alone = run(tokens.merge_tokens, x[2:], I[2:], None, None, 0, m, merging.candidates(30, m))
        assert all(torch.equal(a[2:], b) for a, b in zip(found, alone, strict=True))
        keep, group = ranking(I, m, True)
        assert torch.equal(run(tokens.choose_tokens, x, I, None, 0, m, True)[1], keep)


# ---- ops ----


def calls():
    """A small call of every op."""
    x, I, q, size = torch.randn(1, 7, 16), torch.rand(1, 6), torch.randn(1, 1, 7, 16), torch.rand(1, 7)
    return {
        tokens.fitted_importance: (x, torch.randn(17), size, 1, LEAST),
        tokens.attention_importance: (q, q, None, 1.0, 1, 1, LEAST),
        tokens.merge_tokens: (x, I, size, None, 1, 4, 4),
        tokens.choose_tokens: (x, I, None, 1, 4, True),
        attention.sized_attention: (q, q, q, size, 1.0),
    }


@pytest.mark.skipif(not INTERPRETED, reason="counts calls of the interpreter")
def test_every_op_launches_what_it_says(monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    launches, interpreted = [], InterpretedFunction.run
    monkeypatch.setattr(InterpretedFunction, "run", lambda *a, **k: launches.append(a) or interpreted(*a, **k))
    for op, arguments in calls().items():
        launches.clear()
        op(*arguments)
        assert len(launches) == op.launches, op.function.__name__


def test_fakes_have_the_shapes_of_the_kernels():
    for op, arguments in calls().items():
        arguments = [each.to(DEVICE) if isinstance(each, torch.Tensor) else each for each in arguments]
        torch.library.opcheck(op.library, arguments, test_utils=("test_schema", "test_faketensor"))


# ---- in a model ----


def launching(monkeypatch):
    """The kernels compute everything that they can."""
    for module in (tokens, attention):
        monkeypatch.setattr(module, "usable", lambda *tensors: True)
    monkeypatch.setattr(attention, "takes", lambda *tensors: True)  # float32 too


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tracked", [False, True])
def test_two_stages(way, tracked, monkeypatch):
    x, n, P = torch.randn(2, 42, 24, generator=torch.Generator().manual_seed(1)), 40, 2

    def run(device):
        y = x.to(device)
        owner = torch.arange(n, device=device).expand(2, -1) if tracked else None
        tokens = TokenState(n, owner=owner, seen=y[:, P:] if tracked else None)
        for share in (0.8, 0.25):  # the second stage merges in several rounds
            I = torch.rand(2, y.shape[1] - P, generator=torch.Generator().manual_seed(2)).to(device)
            y, tokens = TokenStage(way, share, P)(y, I, tokens)
        return y.cpu(), [each if each is None else each.cpu() for each in (*tokens[1:3], tokens.owner, tokens.seen)]

    expected, (size, *whole, seen) = run("cpu")
    launching(monkeypatch)
    found, (got_size, *got, got_seen) = run(DEVICE)
    close(found, expected)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    for one, other in ((got_size, size), (got_seen, seen)):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other)
    assert (seen is not None) == tracked and (size is not None) == (way == "merge")


@pytest.mark.parametrize("by,way", [("fitted", "merge"), ("attention", "merge"), ("attention", "evit-fused")])
def test_a_model(by, way, monkeypatch):
    model = build("deit", depth=2)
    graft.graft(model, SparsityConfig(keep="dense", tokens=Tokens(way=way, keep=0.4, stages=(1,), importance=by)))
    model, x = draw_importance(model).eval(), images(model, 1)
    with torch.no_grad():
        expected = model(x)
        launching(monkeypatch)
        with mock.patch.object(nn.functional, "embedding_bag", side_effect=AssertionError("the reference computes")):
            found = model.to(DEVICE)(x.to(DEVICE)).cpu()
    close(found, expected, 1e-4 if INTERPRETED else 1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_stage(way, monkeypatch):
    launching(monkeypatch)
    stage, x, I = TokenStage(way, 0.5, 1), torch.randn(1, 9, 16).to(DEVICE), torch.rand(1, 8).to(DEVICE)
    compiled = torch.compile(lambda x, I: stage(x, I, TokenState(8)), fullgraph=True, backend="aot_eager")
    (found, got), (expected, wanted) = compiled(x, I), stage(x, I, TokenState(8))
    close(found, expected)
    assert torch.equal(got.place, wanted.place)
