"""The CPU kernels against the reference and a dense oracle, over drawn shapes, layouts, ties and bad numbers."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset

from helpers.cpu_calls import (
    ISA,
    MODES,
    STORED,
    TAILS,
    assert_near,
    assert_reference_right,
    assert_right,
    assigned,
    calls,
    heads,
    largest,
    last_kept,
    need,
    oracle,
    plain,
    ranking,
    require_kernels,
)  # fmt: skip
from helpers.op_calls import op
from sparsify.measure.latency import peak_memory
from sparsify.ops import selection
from sparsify.ops.cpu import kernels as cpu


@pytest.fixture(scope="module", autouse=True)
def kernels():
    require_kernels()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(calls())
def test_the_oracle_is_the_reference(call):
    assert_reference_right(call)


@ISA
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_keys_cells_and_output_are_the_references(isa, mode, data):
    need(isa)
    dtype, precision = MODES[mode]
    assert_right(data.draw(calls(dtype)), isa, precision)


@ISA
@settings(max_examples=40, deadline=None)
@given(data=st.data(), by=st.lists(st.sampled_from([1e-15, 1e-6, 1.0, 1e6, 1e15]), min_size=3, max_size=3))
def test_huge_and_tiny_numbers(isa, data, by):
    need(isa)
    call = data.draw(calls(numbers=("normal",), most=6))
    if call.spec.tile:  # squares of the scores, which tiles compare, must not leave float32
        by = [min(max(x, 1e-6), 1e6) for x in by]
    call = replace(call, q=call.q * by[0], k=call.k * by[1], v=call.v * by[2])
    assert_right(call, isa)


@ISA
@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1 << 20))
def test_nan_and_infinity_stay_where_they_matter(isa, data, seed):
    """Never fewer keys, no NaN hidden, and no row harmed by a number that it does not look at."""
    need(isa)
    call = data.draw(calls(numbers=("normal", "coarse"), most=6))
    g = torch.Generator().manual_seed(seed)
    tensors = {name: getattr(call, name).clone() for name in "qkv"}
    for name in data.draw(st.lists(st.sampled_from("qkv"), min_size=1, max_size=2)):
        at = [int(torch.randint(0, n, (), generator=g)) for n in call.q.shape]
        bad = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
        tensors[name][tuple(at[:3]) if data.draw(st.booleans()) else tuple(at)] = bad
    call = replace(call, **tensors)
    out, kept, a = call.probe(isa)
    right, logit, nowhere = oracle(call, kept, a)
    tolerance = largest(call.v) * (2e-5 + 4e-7 * logit)
    right = torch.where(nowhere, out.double(), right)  # the reference gives 0 there, the kernels some mean of values
    assert_near(out, right, tolerance)
    expected = call.expected()
    # Coordinates: those of the reference past a head's own rank are infinity times 0.
    keys = (call.k, call.v, call.coordinates()[1])
    harmed = sum(t.isnan().flatten(2).sum(-1) for t in keys)[..., None] > 0  # (B, H, 1)
    harmed = harmed | ~call.q.isfinite().all(-1) | ~expected.isfinite().all(-1)  # (B, H, N)
    if call.spec.tail == "clusters":  # other cells: `assert_cells` says where they may be
        own = assigned(call, call.coordinates()[2])
        harmed |= (own != a).any(-1, keepdim=True)
    if min(call.spec.budgets) < call.q.shape[2]:  # rounding decides which key is kept
        s, near, _ = ranking(call)
        two = last_kept(s, call.spec.budgets)
        harmed[:, :, call.P :] |= two[..., 0] - two[..., 1] <= near
    assert_near(out, torch.where(nowhere | harmed[..., None], out, expected).double(), 2 * tolerance)


@ISA
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_dense_attention_is_that_of_sdpa(isa, mode, data):
    need(isa)
    dtype, precision = MODES[mode]
    call = data.draw(calls(dtype))
    stored = isa == 3 and "bfloat16" in mode
    out = torch.ops.sparsify_cpu.dense_attention.default(
        *(cpu._flat(t) for t in (call.q, call.k, call.v)), None, call.scale, cpu._bf16(call.q, precision), isa
    )
    q, k, v = ((t.bfloat16() if stored else t).double() for t in (call.q, call.k, call.v))
    logit = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).amax(-1)[..., None, None] * call.scale
    tolerance = largest(v) * (STORED + STORED * logit if stored else 2e-5 + 4e-7 * logit)
    tolerance = tolerance + largest(v) * (2**-8 if dtype == torch.bfloat16 else 0)
    assert_near(heads(out, call), scaled_dot_product_attention(q, k, v, scale=call.scale), tolerance)


@ISA
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tail", TAILS)
def test_all_keys_kept_is_dense_attention(isa, mode, tail):
    need(isa)
    dtype, precision = MODES[mode]
    for tile in ((), (4, 4)):
        call = plain(side=9, budget=82, tail=tail, tile=tile, dtype=dtype)
        right = scaled_dot_product_attention(*(t.double() for t in (call.q, call.k, call.v)))
        exact = mode == "float32" or (isa < 3 and dtype == torch.float32)
        assert_near(heads(call.out(isa, precision), call), right, largest(call.v) * (2e-5 if exact else 0.02))


@ISA
@pytest.mark.parametrize("tile", [(), (4, 4)])
@pytest.mark.parametrize("side,budget", [(14, 10), (14, 20), (24, 29), (24, 58)])
def test_keys_kept_in_bf16_hold_the_attention_of_the_references(isa, tile, side, budget):
    """At least 99.9 % of what the float32 keys hold, and those hold as much as the reference's."""
    need(isa)
    call = plain(side=side, budget=budget, tile=tile)
    attention = (call.q.double() @ call.k.double().mT * call.scale).softmax(-1)
    s = (call.coordinates()[0] @ call.coordinates()[1].mT)[:, :, 1:]
    wanted = selection.top_b(selection.pool_tiles(s, (side, side), tile) if tile else s, budget)
    mass = [
        float((attention * kept)[:, :, 1:].sum(-1).mean()) for _, kept, _ in (call.probe(isa), call.probe(isa, "bf16"))
    ]
    right = float((attention[:, :, 1:] * wanted).sum(-1).mean())
    assert abs(mass[0] - right) < 1e-6 and mass[1] > 0.999 * right


@ISA
@pytest.mark.parametrize("precision", ["input", "bf16"])
def test_a_call_gives_the_same_bits_again_and_on_any_number_of_threads(isa, precision, two_threads):
    need(isa)
    several = [plain(B, tail=tail, tile=tile) for B in (1, 5) for tail in TAILS for tile in ((), (4, 4))]
    first = [call.out(isa, precision) for call in several]
    again = [call.out(isa, precision) for call in several]
    torch.set_num_threads(1)
    alone = [call.out(isa, precision) for call in several]
    assert all(map(torch.equal, first, again)) and all(map(torch.equal, first, alone))


@pytest.mark.parametrize("precision", ["input", "bf16"])
def test_python_threads_do_not_disturb_each_other(precision, two_threads):
    several = [plain(tail=tail, tile=tile, seed=i) for i, tail in enumerate(TAILS) for tile in ((), (4, 4))]
    alone = [call.out(precision=precision) for call in several]
    found: dict[int, list[bool]] = {}

    def work(me: int) -> None:
        found[me] = [
            torch.equal(c.out(precision=precision), right)
            for _ in range(10)
            for c, right in zip(several, alone, strict=True)
        ]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(len(found[i]) == 80 and all(found[i]) for i in range(2))


class Outputs(Dataset):
    """Outputs of calls, computed where they are asked for."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return plain(tail=TAILS[i]).out()


def test_a_data_loader_s_worker_computes_the_same(two_threads):
    right = [Outputs()[i] for i in range(4)]  # on two threads, before the worker is forked
    loader = DataLoader(Outputs(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    assert all(map(torch.equal, loader, right))


class Attention(nn.Module):
    """A call as a model, for `peak_memory`."""

    def __init__(self, call, precision):
        super().__init__()
        self.call, self.precision = call, precision

    def forward(self, images):
        return self.call.out(precision=self.precision)


@pytest.mark.parametrize("precision", ["input", "bf16"])
@pytest.mark.parametrize("tile", [(), (4, 4)])
@pytest.mark.parametrize("tail", ["none", "clusters"])
def test_memory_is_linear_in_tokens(tail, tile, precision):
    peak, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # each thread has scratch of its own
    try:
        for side in (32, 64):
            call = plain(H=6, side=side, budget=side * side // 10, tail=tail, tile=tile)
            peak[side] = peak_memory(Attention(call, precision), torch.zeros(0))
    finally:
        torch.set_num_threads(threads)
    assert peak[64] < 6 * 4097**2 * 4 / 8, "an eighth of the scores of all heads"
    assert peak[64] < 4.4 * peak[32], "four times the tokens"


def test_a_budget_of_more_than_all_keys_is_refused():
    call = plain()
    with pytest.raises(RuntimeError, match="inconsistent budgets"):
        replace(call, spec=call.spec._replace(budgets=(198,))).out()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_registered_op_computes_with_the_kernels(dtype):
    call = plain(dtype=dtype)
    out = op(call.q, call.k, call.v, call.ranking, call.context, call.spec, "cpu")
    assert torch.equal(out, call.out(torch.ops.sparsify_cpu.best_isa()))
