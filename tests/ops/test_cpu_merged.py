"""The CPU kernels on fewer tokens: those that stand for several (`size`), on any patches of the grid (`place`)."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from helpers.cpu_calls import (
    ISA,
    MODES,
    STORED,
    TAILS,
    TILES,
    assert_near,
    assert_reference_right,
    assert_right,
    assigned,
    calls,
    grid_of,
    heads,
    largest,
    last_kept,
    need,
    oracle,
    plain,
    require_kernels,
)
from helpers.op_calls import op
from sparsify.ops import attention, selection
from sparsify.ops.cpu import kernels as cpu


@pytest.fixture(scope="module", autouse=True)
def kernels():
    require_kernels()


def merged(call, seed=0, n=None):
    """`call` on n of its patches, some of them twice, with sizes; prefix tokens as they are."""
    g = torch.Generator().manual_seed(seed)
    (B, _, N, _), P = call.q.shape, call.P
    place = torch.randint(0, N - P, (B, n or (N - P) // 2), generator=g).sort(-1).values
    index = torch.cat([torch.arange(P).expand(B, P), place + P], -1)[:, None, :, None]
    q, k, v = (t.take_along_dim(index, 2) for t in (call.q, call.k, call.v))
    size = torch.cat([torch.ones(B, P), torch.randn(place.shape, generator=g).exp()], -1)
    spec = call.spec._replace(budgets=tuple(min(b, q.shape[2]) for b in call.spec.budgets))
    return replace(call, q=q, k=k, v=v, spec=spec, size=size, place=place)


@settings(max_examples=80, deadline=None)
@given(calls(merged=True))
def test_the_oracle_is_the_reference(call):
    assert_reference_right(call)


@ISA
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_keys_cells_and_output_are_the_references(isa, mode, data):
    need(isa)
    dtype, precision = MODES[mode]
    assert_right(data.draw(calls(dtype, merged=True)), isa, precision)


@ISA
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_op_is_the_reference_where_scores_differ(isa, data):
    """Not by way of the oracle."""
    need(isa)
    call = data.draw(calls(numbers=("normal",), most=5, merged=True))
    out, kept, a = call.probe(isa)
    row, col, f = call.coordinates()
    s = (row @ col.mT)[:, :, call.P :]
    s = s if call.shift is None else s + call.shift[:, None, None]
    if call.spec.tile and s.shape[2]:
        s = selection.pool_tiles(s, grid_of(call), call.spec.tile, call.place)
    same = (selection.top_b(s, call.spec.budgets) == kept[:, :, call.P :]).all(-1).all(-1)  # (B, H)
    if call.spec.tail == "clusters":
        weight = None if call.size is None else call.size[:, None].expand(f.shape[:3])
        same &= (assigned(call, f, weight) == a).all(-1)
    two, all_keys = last_kept(s, call.spec.budgets), torch.tensor(call.spec.budgets) == s.shape[-1]
    clear = ((two[..., 0] - two[..., -1]) > 1e-4 * s.abs().amax(-1)).all(-1) | all_keys
    if call.spec.tail != "clusters":
        assert bool((same | ~clear).all()), "other keys"
    _, logit, _ = oracle(call, kept, a)
    tolerance = (largest(call.v) * (4e-5 + 8e-7 * logit)).masked_fill(~same[..., None, None], torch.inf)
    assert_near(out, call.expected().double(), tolerance)


@ISA
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tile", [(), (4, 4)])
@pytest.mark.parametrize("P,n", [(3, 0), (1, 0), (1, 1), (3, 1), (1, 2), (0, 3), (0, 1), (2, 1)])
def test_as_few_tokens_as_there_can_be(isa, mode, tile, P, n):
    need(isa)
    dtype, precision = MODES[mode]
    for tail in TAILS:
        call = plain(B=2, side=6, tail=tail, tile=tile, dtype=dtype)
        q, k, v = (t[:, :, : P + n] for t in (call.q, call.k, call.v))
        size = torch.rand(2, P + n, generator=torch.Generator().manual_seed(n)) + 0.5
        place = torch.tensor([[35, 0, 35], [7, 7, 7]])[:, :n]
        for budget in range(1, P + n + 1):
            spec = call.spec._replace(budgets=(budget,), prefix=P)
            assert_right(replace(call, q=q, k=k, v=v, spec=spec, size=size, place=place), isa, precision)


@ISA
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tile", [(), (3, 5)])
@pytest.mark.parametrize("tail", TAILS)
def test_a_key_of_size_s_is_s_keys(isa, mode, tile, tail):
    """Where all keys are kept."""
    need(isa)
    dtype, precision = MODES[mode]
    call = merged(plain(B=1, side=9, tail=tail, tile=tile, dtype=dtype))
    N, g = call.q.shape[2], torch.Generator().manual_seed(1)
    times = torch.cat([torch.ones(1, dtype=torch.long), torch.randint(1, 5, (N - 1,), generator=g)])
    few = replace(call, size=times[None].float(), spec=call.spec._replace(budgets=(N,)))
    many = {name: getattr(call, name).repeat_interleave(times, 2) for name in "qkv"}
    place, spec = call.place.repeat_interleave(times[1:], 1), call.spec._replace(budgets=(int(times.sum()),))
    right = replace(call, **many, size=None, place=place, spec=spec).out(isa, precision)
    first = times.cumsum(0) - times
    near = largest(call.v) * (2e-5 if mode == "float32" or (isa < 3 and dtype == torch.float32) else 0.02)
    assert_near(heads(few.out(isa, precision), call), heads(right, call)[:, :, first], near)


@ISA
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tile", [(), (4, 4)])
@pytest.mark.parametrize("tail", TAILS)
def test_sizes_of_one_and_places_in_order_change_nothing(isa, mode, tile, tail):
    need(isa)
    dtype, precision = MODES[mode]
    call = plain(B=2, tail=tail, tile=tile, dtype=dtype)
    out, kept, a = call.probe(isa, precision)
    B, N = call.q.shape[0], call.q.shape[2]
    size, place = torch.ones(B, N), torch.arange(N - 1).expand(B, -1)
    for change in (dict(place=place), dict(size=size), dict(size=size, place=place)):
        again = replace(call, **change).probe(isa, precision)
        near = largest(call.v) * (1e-5 if mode == "float32" else 2**-8)
        assert torch.equal(again[1], kept) and torch.equal(again[2], a)
        assert_near(again[0], out.double(), near if "size" in change else 0)


@ISA
@pytest.mark.parametrize("tile", [(), (4, 4)])
@pytest.mark.parametrize("tail", TAILS)
def test_the_order_of_patches_does_not_matter(isa, tile, tail):
    need(isa)
    call = merged(plain(B=2, tail=tail, tile=tile), n=90)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(2))
    tokens = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
    several = {name: getattr(call, name)[:, :, tokens] for name in "qkv"}
    other = replace(call, **several, size=call.size[:, tokens], place=call.place[:, order])
    (out, kept, a), (moved, moved_kept, moved_a) = call.probe(isa), other.probe(isa)
    assert torch.equal(moved_kept, kept[:, :, tokens][..., tokens]) and torch.equal(moved_a, a[..., tokens])
    assert_near(moved, out[:, :, tokens].double(), largest(call.v) * 2e-5)


@ISA
def test_a_cell_with_all_keys_kept_weighs_nothing(isa):
    """Whatever the sizes sum to: its mean would be far off, were a remainder of rounding left."""
    need(isa)
    g = torch.Generator().manual_seed(3)
    for tile in ((), (4, 4)):
        call = plain(side=8, budget=64, tail="mean", tile=tile)
        k = torch.zeros_like(call.k)
        k[:, :, 0], q = -1.0, call.q.abs()  # the prefix key comes last everywhere: all patches are kept
        size = torch.rand(1, 65, generator=g) * 1e3 + 1e-3
        size[:, 0] = 1e-9
        v = call.v.clone()
        v[:, :, 1:] *= 0
        few = replace(call, q=q, k=k, v=v, size=size, head=(None, None))
        out, kept, a = few.probe(isa)
        assert bool(kept[:, :, 1:, 1:].all())
        right, _, _ = oracle(few, kept, a)
        assert_near(out, right, 2e-6 * right.abs().amax() + 1e-20)


@ISA
@pytest.mark.parametrize("tile", [(), (4, 4)])
@pytest.mark.parametrize("tail", ["cells", "clusters"])
def test_an_empty_cell_is_no_row_s_largest_logit(isa, tile, tail):
    """Where all logits are far below the 0 of a key of zeros."""
    need(isa)
    call = merged(plain(side=8, budget=5, tail=tail, tile=tile))
    q, k = call.q.abs() + 20, -call.k.abs() - 20
    place = call.place % 8  # one row of patches: most cells are empty
    assert float((q @ k.mT).amax()) * call.scale < -1000
    assert_right(replace(call, q=q, k=k, place=place), isa)


@ISA
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_dense_attention_is_that_of_sdpa(isa, mode, data):
    need(isa)
    dtype, precision = MODES[mode]
    call = data.draw(calls(dtype, merged=True))
    stored = isa == 3 and "bfloat16" in mode
    tensors = [cpu._flat(t) for t in (call.q, call.k, call.v)]
    flag = cpu._bf16(call.q, precision)
    out = torch.ops.sparsify_cpu.dense_attention.default(*tensors, call.size, call.scale, flag, isa)
    q, k, v = ((t.bfloat16() if stored else t).double() for t in (call.q, call.k, call.v))
    logit = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).amax(-1)[..., None, None] * call.scale
    tolerance = largest(v) * (STORED + STORED * logit if stored else 2e-5 + 4e-7 * logit)
    tolerance = tolerance + largest(v) * (2**-8 if dtype == torch.bfloat16 else 0)
    mask = None if call.size is None else call.size.double().log()[:, None, None]
    right = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)
    assert_near(heads(out, call), right, tolerance)


def test_threads_and_layouts_of_the_tensors_do_not_matter():
    several = [merged(plain(3, tail=tail, tile=tile, seed=i)) for i, tail in enumerate(TAILS) for tile in TILES]
    first = [call.out() for call in several]
    other = [
        replace(call, size=call.size.double().mT.contiguous().mT, place=call.place.int().mT.contiguous().mT).out()
        for call in several
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(map(torch.equal, first, [call.out() for call in several]))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, first, other))


def test_a_batch_is_its_images():
    for tail in TAILS:
        for tile in TILES:
            call = merged(plain(4, tail=tail, tile=tile))
            alone = [
                replace(call, q=call.q[[i]], k=call.k[[i]], v=call.v[[i]], size=call.size[[i]], place=call.place[[i]])
                for i in range(4)
            ]
            assert torch.equal(call.out(), torch.cat([each.out() for each in alone]))


@pytest.mark.parametrize("bad", [-1, 196, 1 << 40, -(1 << 62)])
def test_a_place_outside_the_grid_is_refused(bad):
    for tail in TAILS:
        call = merged(plain(tail=tail))
        call.place[0, 17] = bad
        with pytest.raises(RuntimeError, match="outside the grid"):
            call.out()


def test_sizes_and_places_of_other_tokens_are_refused():
    call = merged(plain())
    for change in (dict(size=call.size[:, 1:]), dict(place=call.place[:, 1:]), dict(size=call.size[0])):
        with pytest.raises(RuntimeError, match="inconsistent sizes"):
            replace(call, **change).out()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_registered_ops_compute_with_the_kernels(dtype):
    call = merged(plain(dtype=dtype))
    out = op(call.q, call.k, call.v, call.ranking, call.context, call.spec, "cpu")
    assert torch.equal(out, call.out(torch.ops.sparsify_cpu.best_isa()))
    assert torch.equal(
        attention.dense("dense-cpu", call.q, call.k, call.v, None, call.scale, "input", call.size),
        cpu.dense(call.q, call.k, call.v, call.scale, "input", call.size),
    )
