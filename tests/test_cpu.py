"""The CPU kernels against the reference and a dense oracle, over drawn shapes, layouts, ties and bad numbers.

Two things a kernel may do otherwise than the reference: keep another key whose score differs by rounding only, and put a
key that lies between two clusters into the other one. So outputs are compared with the equation of `tails.py` in float64
over the keys and cells that the kernel used (`oracle`), and these with the reference's.
"""

import platform
import sys
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad, scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset

from sparsify import ops
from sparsify.ops import cpu, reference, tails
from sparsify.ops.cpu import build
from sparsify.ops.spec import Spec
from sparsify.profiling.latency import peak_memory

ISA = pytest.mark.parametrize("isa", [1, 2, 3], ids=cpu.ISAS[1:])
TAILS = ["none", "mean", "cells", "clusters"]
TILES = [(), (2, 2), (4, 4), (3, 5), (40, 40)]
SIZES = [1, 7, 8, 16, 63, 64, 65, 128]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Every test is skipped where there can be no kernels; where there should be some, having none is a failure."""
    if (reason := cpu.available()) is not None:
        able = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64") and build.find_compiler()
        assert not able or "no AVX2" in reason, reason
        pytest.skip(reason)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def need(isa):
    if isa > torch.ops.sparsify_cpu.best_isa():
        pytest.skip(f"this processor has no {cpu.ISAS[isa]}")


@dataclass(repr=False)
class Call:
    """Arguments of one call of either op: `head` is a_q and a_k; `token` the six tensors of the paper's and coef_scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    spec: Spec
    ranks: list[int]
    head: tuple = (None, None)
    token: tuple = ()

    def __repr__(self):
        predictor = "token" if self.token else "folded" if self.head[0] is None else "unfolded"
        return f"{self.q.dtype} {[*self.q.shape]}, strides {self.q.stride()}, {predictor} {self.ranks}, {self.spec}"

    def _repr_pretty_(self, printer, cycle):  # what hypothesis looks for
        printer.text(repr(self))

    @property
    def scale(self):
        return self.q.shape[-1] ** -0.5

    @property
    def P(self):
        return min(self.spec.prefix, self.q.shape[2])

    def kernel(self, name, isa, precision):
        def op(*arguments):
            return getattr(torch.ops.sparsify_cpu, name).default(*arguments[:-1], isa)

        if self.token:
            *weights, by = self.token
            return cpu.token_lowrank(self.q, self.k, self.v, *weights, self.scale, by, self.spec, precision, op)
        return cpu.head_lowrank(self.q, self.k, self.v, *self.head, self.ranks, self.scale, self.spec, precision, op)

    def out(self, isa=0, precision="input"):
        return self.kernel("sparse_attention", isa, precision)

    def probe(self, isa=0, precision="input"):
        """Output [B, H, N, d], kept keys as bool [B, H, N, N], the cell of every key [B, H, N] as the reference counts."""
        out, kept, cells = self.kernel("probe_attention", isa, precision)
        (B, H, N, d), P = self.q.shape, self.P
        assert bool((kept[:, :, :P] == -1).all() and (cells[:, :, :P] == -1).all())
        keys = kept[:, :, P:].long()
        assert bool(((keys >= 0) & (keys < N)).all()), "no such key"
        mask = torch.zeros(B, H, N - P, N, dtype=torch.bool).scatter_(-1, keys, True)
        assert bool((mask.sum(-1) == self.spec.budget).all()), "not b different keys"
        a = torch.cat([torch.arange(P).expand(B, H, P), cells[:, :, P:].long() + P], -1)
        return out.view(B, N, H, d).transpose(1, 2), pad(mask, (0, 0, P, 0), value=True), a

    def coordinates(self):
        """The reference's row, col and features of the clusters, as float32."""
        if self.token:
            w_down, w_up, *rest, by = self.token
            weights = (w_down, *rest)
            coef = reference.token_lowrank_coefficients(self.q.float(), self.k.float(), weights, by, self.spec)
            return coef, w_up.mT.expand(*self.q.shape[:2], -1, -1), self.k.float()
        row, col = reference.head_lowrank_scores(self.q, self.k, *self.head, self.ranks)
        return row.float(), col.float(), col.float()

    def expected(self):
        """The reference's output [B, H, N, d], as float32."""
        q, k, v = (t.float() for t in (self.q, self.k, self.v))
        (B, H, N, d), row_col_f = q.shape, self.coordinates()
        out = reference.attend(q, k, v, *row_col_f, None, self.scale, self.spec)
        return out.view(B, N, H, d).transpose(1, 2)


def grids(call):
    """The grid of the patches, and that of the cells."""
    return tails.patch_grid(call.q.shape[2] - call.P, call.spec.grid), call.spec.cells


def layout(draw, g, B, H, N, d, dtype):
    """q, k, v as `qkv` gives them, contiguous, the same for all heads, or column by column."""
    kind = draw(st.sampled_from(["qkv", "contiguous", "shared", "columns"]))
    if kind == "qkv":
        return torch.randn(B, N, 3, H, d, generator=g).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    if kind == "contiguous":
        return torch.randn(3, B, H, N, d, generator=g).to(dtype).unbind(0)
    if kind == "shared":
        return torch.randn(3, B, 1, N, d, generator=g).to(dtype).unbind(0)  # expanded when their numbers are settled
    return torch.randn(3, B, H, d, N, generator=g).to(dtype).mT.unbind(0)


@st.composite
def calls(draw, dtype=torch.float32, numbers=("normal", "normal", "coarse", "copies", "equal", "zeros"), most=12):
    """Calls of both ops on up to most^2 + 5 tokens. coarse: whole numbers; copies: three different keys; equal: one;
    zeros: half of the queries are 0."""
    B, H, d = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from(SIZES) | st.integers(1, 200))
    grid, P = (draw(st.integers(1, most)), draw(st.integers(1, most))), draw(st.integers(0, 5))
    if P + grid[0] * grid[1] < 2:
        grid = (1, 2)
    N = P + grid[0] * grid[1]
    g = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    q, k, v = layout(draw, g, B, H, N, d, dtype)
    tile, cells = draw(st.sampled_from(TILES)), (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    budget = draw(st.sampled_from([1, N, max(1, N // 10)]) | st.integers(1, N))
    prefix = draw(st.sampled_from([P, P, P, P, N + 2]))
    spec = Spec(budget, prefix, draw(st.sampled_from(TAILS)), grid, cells, tile)
    kind, which = draw(st.sampled_from(numbers)), torch.randint(0, min(3, N), (N,), generator=g)
    if kind == "coarse":
        q.copy_(q.round()), k.copy_(k.round())
    if kind in ("copies", "equal"):
        k.copy_(k[:, :, which if kind == "copies" else which * 0])
    if kind == "zeros":
        q[:, :, ::2] = 0
    q, k, v = (t.expand(B, H, N, d) for t in (q, k, v))
    predictor = draw(st.sampled_from(["folded", "unfolded", "token"]))
    if predictor == "token":
        r = draw(st.integers(1, 20))
        spec = spec._replace(
            coef_topk=draw(st.sampled_from([0, 0, 2])), coef_threshold=draw(st.sampled_from([0, 0.3, 0.9]))
        )
        w_down, w_up = torch.rand(r, N, generator=g), torch.randn(draw(st.sampled_from([1, H])), r, N, generator=g)
        if kind in ("copies", "equal"):
            w_up = w_up[..., which if kind == "copies" else which * 0]
        c = draw(st.sampled_from([0, 3]))
        channels = [torch.randn(*s, generator=g) for s in ((c, d), (c,), (c, d), (c,))] if c else [None] * 4
        return Call(q, k, v, spec, [r] * H, token=(w_down, w_up, *channels, 0.4))
    r = min(d, 40) if predictor == "folded" else 40
    ranks = draw(st.lists(st.integers(1, r), min_size=H, max_size=H))
    if predictor == "folded":
        return Call(q, k, v, spec, ranks)
    a = torch.randn(2, H, d, max(ranks), generator=g) * reference.rank_mask(ranks, q.float())
    return Call(q, k, v, spec, ranks, head=tuple(a.to(dtype)))


def oracle(call, kept, a, rounded=False):
    """The equation of tails.py in float64 over these keys and cells [B, H, N, d]; the largest that a row's logits can be
    and whether all are -inf, [B, H, N, 1] each.

    rounded: of q, k and v as bfloat16 stores them. What is not finite counts only where it has weight.
    """
    q, k, v = ((t.bfloat16() if rounded else t).double() for t in (call.q, call.k, call.v))
    logits, values, count = q @ k.mT * call.scale, v, kept.double()
    if call.spec.tail != "none":
        m = int(a.max()) + 1
        member = one_hot(a, m).double()  # (B, H, N, m)
        size = member.sum(-2).unsqueeze(-1).clamp_min(1)
        k_mean, v_mean = (tails.cell_sums(t, a, m) / size for t in (k, v))
        logits, values = torch.cat([logits, q @ k_mean.mT * call.scale], -1), torch.cat([v, v_mean], -2)
        count = torch.cat([count, (~kept).double() @ member], -1)
    logits = logits.masked_fill(count == 0, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    e = count * (logits - top.masked_fill(top == -torch.inf, 0)).exp()
    z = e.sum(-1, keepdim=True)
    out = (e / z.masked_fill(z == 0, 1)) @ values.nan_to_num(0, 0, 0)
    out[((count > 0).double() @ (~values.isfinite()).double()) > 0] = torch.nan
    q, k = (t.nan_to_num(0, 0, 0).norm(dim=-1) for t in (q, k))
    return out, (q * k.amax(-1, keepdim=True) * call.scale).unsqueeze(-1), z == 0


def assert_near(out, expected, tolerance):
    """Not finite where `expected` is not; elsewhere nearer than `tolerance`, which broadcasts."""
    finite = expected.isfinite()
    assert bool((out.isfinite() <= finite).all()), "a number that should not be finite"
    excess = ((out.double() - expected.double()).abs() - tolerance).masked_fill(~finite, -1).nan_to_num(nan=torch.inf)
    assert bool((excess <= 0).all()), f"over the tolerance by {float(excess.max()):.2g}"


def largest(v):
    """Of each head: [B, H, 1, 1]."""
    return v.double().nan_to_num(0, 0, 0).abs().amax((-1, -2), keepdim=True)


def over_tiles(x, grid, tile):
    """The largest of x [B, H, n] over the queries of each tile."""
    t = (torch.arange(grid[0])[:, None] // tile[0] * grid[1] + torch.arange(grid[1]) // tile[1]).flatten()
    return torch.stack([x[:, :, t == i].amax(-1) for i in t], -1)


def ranking(call):
    """What ranks the keys of the patch rows in float64 (NaN lowest), what rounding to float32 may change of it, and one
    standard deviation: [B, H, n, N], [B, H, n] and [B, H, n]."""
    row, col, _ = (t.double() for t in call.coordinates())
    s = (row @ col.mT)[:, :, call.P :]
    sd = s.nan_to_num(0, 0, 0).var(-1, correction=0).sqrt() if s.numel() else s[..., 0]
    row, col = (t.nan_to_num(0, 0, 0).norm(dim=-1) for t in (row, col))
    near = 1e-5 * row[:, :, call.P :] * col.amax(-1, keepdim=True)
    if call.spec.tile and s.shape[2]:
        grid, _ = grids(call)
        s = reference.pool_tiles(s, grid, call.spec.tile)
        near = (near / sd).nan_to_num(0)
        near = near.masked_fill(near > 0.1, torch.inf)  # scores that differ by rounding alone: any order will do
        near = over_tiles(near, grid, call.spec.tile)
        sd = torch.ones_like(near)
    return s.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), near, sd


def assert_highest(call, kept, coarse=False):
    """The kept keys have the highest scores but for rounding (`coarse`: to bytes); of equal keys those of lower index."""
    s, near, sd = ranking(call)
    near = 1000 * near + 0.05 * sd if coarse else near
    kept = kept[:, :, call.P :]
    dropped, least = s.masked_fill(kept, -torch.inf).amax(-1), s.masked_fill(~kept, torch.inf).amin(-1)
    excess = (dropped - least).nan_to_num(0, posinf=torch.inf, neginf=-torch.inf) - near  # equal infinities: 0
    assert bool((excess <= 0).all()), f"a key with a score higher by {float(excess.max()):.2g} was dropped"
    row, col, _ = call.coordinates()
    first = torch.arange(s.shape[-1]) < call.spec.budget
    zero = ~row[:, :, call.P :].any(-1)
    if call.spec.tile and s.shape[2]:
        zero = ~over_tiles(~zero, grids(call)[0], call.spec.tile)
    even = col.isfinite().all(-1).all(-1)
    assert bool((kept[zero & even[..., None]] == first).all()), "scores are all 0, and not the first keys were kept"
    for b, h in torch.cartesian_prod(*map(torch.arange, col.shape[:2])).tolist():
        _, copy = (col[b, h] + 0.0).view(torch.int32).unique(dim=0, return_inverse=True)
        earlier = ((copy[:, None] == copy) & torch.ones(len(copy), len(copy)).tril(-1).bool()).float()  # (N, N)
        skipped = kept[b, h] & (kept[b, h].float() @ earlier.T != earlier.sum(-1))
        assert not bool(skipped.any()), "a key was kept and not its copy of lower index"


def assert_cells(call, a):
    """Cells of the reference in float64, in heads without keys that lie between two of them."""
    (B, H, N, _), P, spec, (grid, _) = call.q.shape, call.P, call.spec, grids(call)
    if spec.tail == "none" or P == N:
        return
    f = call.coordinates()[2].double()
    clear = torch.ones(B, H, dtype=torch.bool)
    if spec.tail == "clusters":
        f = f.nan_to_num(0, 0, 0)
        x, now = f[:, :, P:], tails.grid_cells(grid, spec.cells).expand(B, H, -1)
        m = int(now.max()) + 1
        for _ in range(tails.LLOYD_STEPS if m > 1 else 0):
            count = tails.cell_sums(torch.ones_like(x[..., :1]), now, m)
            distance = torch.cdist(x, tails.cell_sums(x, now, m) / count.clamp_min(1)).square()
            distance = distance.masked_fill(count.mT == 0, torch.inf)
            two = distance.topk(2, largest=False).values
            clear &= (two[..., 1] - two[..., 0] > 1e-5 * x.square().sum(-1).amax(-1, keepdim=True)).all(-1)
            now = distance.argmin(-1)
        assert bool(((a[..., P:] >= P) & (a[..., P:] < P + m)).all())
    right = tails.assign(spec.tail, f, None, P, grid, spec.cells)
    assert torch.equal(a[clear], right[clear]), "another cell"


def assert_right(call, isa, precision="input"):
    """Keys, cells and output of a call on finite numbers."""
    stored = isa == 3 and (precision == "bf16" or call.q.dtype == torch.bfloat16)
    out, kept, a = call.probe(isa, precision)
    assert out.dtype == call.q.dtype
    assert_highest(call, kept, coarse=stored)
    assert_cells(call, a)
    expected, logit, _ = oracle(call, kept, a, rounded=stored)
    V = largest(call.v)
    tolerance = V * (STORED + STORED * logit if stored else 2e-5 + 4e-7 * logit)
    if out.dtype == torch.bfloat16:
        tolerance = tolerance + V * 2**-8
    assert_near(out, expected, tolerance)
    low, high = call.v.double().amin(-2, keepdim=True), call.v.double().amax(-2, keepdim=True)
    slack = V * (2**-7 if stored or out.dtype == torch.bfloat16 else 2e-5)
    assert bool(((out >= low - slack) & (out <= high + slack)).all()), "no mean of values"


MODES = {
    "float32": (torch.float32, "input"),
    "bfloat16": (torch.bfloat16, "input"),
    "float32 stored as bfloat16": (torch.float32, "bf16"),
}
# bf16 storage: the output's error over the largest value, and once more for each unit of the largest logit.
STORED = 2**-9


@settings(max_examples=40, deadline=None)
@given(calls())
def test_the_oracle_is_the_reference(call):
    row, col, f = call.coordinates()
    (grid, cells), s = grids(call), (row @ col.mT)[:, :, call.P :]
    if call.spec.tile and s.shape[2]:
        s = reference.pool_tiles(s, grid, call.spec.tile)
    kept = pad(reference.top_b(s, call.spec.budget), (0, 0, call.P, 0), value=True)
    a = tails.assign("mean" if call.spec.tail == "none" else call.spec.tail, f, None, call.P, grid, cells)
    right, logit, _ = oracle(call, kept, a)
    assert_near(call.expected(), right, largest(call.v) * (2e-5 + 4e-7 * logit))


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
        own = tails.assign("clusters", call.coordinates()[2], None, call.P, *grids(call))
        harmed |= (own != a).any(-1, keepdim=True)
    if call.spec.budget < call.q.shape[2]:  # rounding decides which key is kept
        s, near, _ = ranking(call)
        two = s.sort(-1, descending=True).values[..., call.spec.budget - 1 :][..., :2]
        harmed[:, :, call.P :] |= two[..., 0] - two[..., 1] <= near
    assert_near(out, torch.where(nowhere | harmed[..., None], out, expected).double(), 2 * tolerance)


def plain(B=1, H=2, side=14, d=64, budget=20, tail="cells", tile=(), dtype=torch.float32, seed=0):
    """A call on one prefix token and side^2 patches laid out as `qkv` gives them; neighbouring patches look alike."""
    g = torch.Generator().manual_seed(seed)
    patches = torch.nn.functional.interpolate(
        torch.randn(B, 3 * H * d, 5, 5, generator=g), (side, side), mode="bilinear"
    )
    x = torch.cat([torch.randn(B, 3 * H * d, 1, generator=g), patches.flatten(2)], -1)
    x = (2 * x + 0.5 * torch.randn(x.shape, generator=g)).mT.reshape(B, -1, 3, H, d)
    x[:, :, :2] *= 0.93 ** torch.arange(d)  # the first coordinates of q and k hold the most, as calibration leaves them
    q, k, v = x.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return Call(q, k, v, Spec(budget, 1, tail, (side, side), (4, 3), tile), [16] * H)


def heads(out, call):
    """[B, N, H*d] as [B, H, N, d]."""
    return out.unflatten(-1, (call.q.shape[1], -1)).transpose(1, 2)


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
        *(cpu._flat(t) for t in (call.q, call.k, call.v)), call.scale, cpu._bf16(call.q, precision), isa
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
    wanted = reference.top_b(reference.pool_tiles(s, (side, side), tile) if tile else s, budget)
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
    peak = {}
    for side in (32, 64):
        call = plain(H=6, side=side, budget=side * side // 10, tail=tail, tile=tile)
        peak[side] = peak_memory(Attention(call, precision), torch.zeros(0))
    assert peak[64] < 6 * 4097**2 * 4 / 8, "an eighth of the scores of all heads"
    assert peak[64] < 4.4 * peak[32], "four times the tokens"


def test_a_budget_of_more_than_all_keys_is_refused():
    call = plain()
    with pytest.raises(RuntimeError, match="inconsistent sizes"):
        replace(call, spec=call.spec._replace(budget=198)).out()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_registered_op_computes_with_the_kernels(dtype):
    call = plain(dtype=dtype)
    out = ops.head_lowrank_attention(
        call.q, call.k, call.v, None, None, None, call.ranks, call.scale, *call.spec[:6], "cpu", "input"
    )
    assert torch.equal(out, call.out(torch.ops.sparsify_cpu.best_isa()))
