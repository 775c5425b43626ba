"""Calls of the CPU kernels on drawn inputs, and what is right for them: shared by the tests of the kernels.

Two things a kernel may do otherwise than the reference: keep another key whose score differs by rounding only, and put a
key that lies between two clusters into the other one. So outputs are compared with the equation of `tails.py` in float64
over the keys and cells that the kernel used (`oracle`), and these with the reference's.
"""

import platform
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot, pad

from helpers.op_calls import head_ranking, token_ranking
from sparsify.ops import reference, selection, tails
from sparsify.ops.cpu import build, kernels
from sparsify.ops.selection import Context
from sparsify.ops.spec import Spec, of_head

ISA = pytest.mark.parametrize("isa", [1, 2, 3], ids=kernels.ISAS[1:])
TAILS = ["none", "mean", "cells", "clusters"]
TILES = [(), (2, 2), (4, 4), (3, 5), (40, 40)]
HEAD_SIZES = [1, 7, 8, 16, 63, 64, 65, 128]
MODES = {
    "float32": (torch.float32, "input"),
    "bfloat16": (torch.bfloat16, "input"),
    "float32 stored as bfloat16": (torch.float32, "bf16"),
}
# bf16 storage: the output's error over the largest value, and once more for each unit of the largest logit.
STORED = 2**-9


def require_kernels():
    """Skips where there can be no kernels; where there should be some, having none is a failure."""
    if (reason := kernels.available()) is not None:
        able = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64") and build.find_compiler()
        assert not able or "no AVX2" in reason, reason
        pytest.skip(reason)


def need(isa):
    if isa > torch.ops.sparsify_cpu.best_isa():
        pytest.skip(f"this processor has no {kernels.ISAS[isa]}")


@dataclass(repr=False)
class Call:
    """Arguments of one call: `head` is a_q and a_k; `token` W_down, W_up, the four of the reduction, and scale, top-k and
    threshold of the coefficients."""

    q: Tensor
    k: Tensor
    v: Tensor
    spec: Spec
    ranks: list[int]
    head: tuple = (None, None)
    token: tuple = ()
    size: Tensor | None = None
    place: Tensor | None = None

    def __repr__(self):
        predictor = "token" if self.token else "folded" if self.head[0] is None else "unfolded"
        merged = f", size {self.size}, place {self.place}" if self.size is not None or self.place is not None else ""
        shape = f"{self.q.dtype} {[*self.q.shape]}, strides {self.q.stride()}"
        return f"{shape}, {predictor} {self.ranks}, {self.spec}{merged}"

    def _repr_pretty_(self, printer, cycle):  # what hypothesis looks for
        printer.text(repr(self))

    def __post_init__(self):
        self.spec = self.spec._replace(scale=self.scale)

    @property
    def scale(self):
        return self.q.shape[-1] ** -0.5

    @property
    def context(self):
        return Context(None, self.size, self.place)

    @property
    def ranking(self):
        if self.token:
            w_down, w_up, *reduce, coef = self.token
            return token_ranking(self.q, self.k, w_down, w_up, reduce, None, *coef)
        return head_ranking(self.q, self.k, *self.head, self.size, self.ranks, self.scale)

    @property
    def shift(self):
        """What sizes add to the scores: nothing for the token predictor."""
        return None if self.size is None or self.token else self.size.log() / self.scale

    @property
    def P(self):
        return min(self.spec.prefix, self.q.shape[2])

    def kernel(self, name, isa, precision):
        def op(*arguments):
            return getattr(torch.ops.sparsify_cpu, name).default(*arguments[:-1], isa)

        return kernels.attention(self.q, self.k, self.v, self.ranking, self.context, self.spec, precision, op)

    def out(self, isa=0, precision="input"):
        return self.kernel("sparse_attention", isa, precision)

    def probe(self, isa=0, precision="input"):
        """Output [B, H, N, d], kept keys as bool [B, H, N, N], the cell of every key [B, H, N] as the reference counts."""
        out, kept, cells = self.kernel("probe_attention", isa, precision)
        (B, H, N, d), P = self.q.shape, self.P
        assert bool((kept[:, :, :P] == -1).all() and (cells[:, :, :P] == -1).all())
        mask = torch.zeros(B, H, N - P, N, dtype=torch.bool)
        for h in range(H):
            b = of_head(self.spec.budgets, h)
            keys = kept[:, h, P:, :b].long()
            assert bool(((keys >= 0) & (keys < N)).all()), "no such key"
            assert bool((kept[:, h, P:, b:] == -1).all()), "more than b keys"
            mask[:, h].scatter_(-1, keys, True)
            assert bool((mask[:, h].sum(-1) == b).all()), "not b different keys"
        a = torch.cat([torch.arange(P).expand(B, H, P), cells[:, :, P:].long() + P], -1)
        return out.view(B, N, H, d).transpose(1, 2), pad(mask, (0, 0, P, 0), value=True), a

    def coordinates(self):
        """The reference's row, col and features of the clusters, as float32."""
        return tuple(t.float() for t in self.ranking.written(self.q, self.k)[:3])

    def expected(self):
        """The reference's output [B, H, N, d], as float32."""
        q, k, v = (t.float() for t in (self.q, self.k, self.v))
        B, H, N, d = q.shape
        row, col, features = self.coordinates()
        ranking = self.ranking._replace(row=row, col=col, features=features)
        out = reference.attend(q, k, v, ranking, self.context, self.spec)
        return out.view(B, N, H, d).transpose(1, 2)


def grid_of(call):
    """The grid of the patches."""
    return call.spec.grid if call.place is not None else tails.patch_grid(call.q.shape[2] - call.P, call.spec.grid)


def assigned(call, f, weight=None, tail=None):
    """The cell of every key, [B, H, N], head by head; f: features; tail: another than the call's."""
    found = []
    for h in range(f.shape[1]):
        own = None if weight is None else weight[:, h : h + 1]
        cells = of_head(call.spec.cells, h)
        tail_of = tails.TAILS[tail or call.spec.tail]
        found.append(tail_of.assign(f[:, h : h + 1], own, call.P, grid_of(call), cells, call.place))
    return torch.cat(found, 1)


def last_kept(s, budgets):
    """The b-th and the next lower score of each row of s [B, H, n, N]: [B, H, n, 2]; the last twice where b = N."""
    s = s.sort(-1, descending=True).values
    heads = [
        s[:, h, :, [of_head(budgets, h) - 1, min(of_head(budgets, h), s.shape[-1] - 1)]] for h in range(s.shape[1])
    ]
    return torch.stack(heads, 1)


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


def drawn_sizes(draw, g, B, N):
    """[B, N] above 0, or None."""
    kind = draw(st.sampled_from(["none", "one", "whole", "fractional", "skewed"]))
    if kind == "none":
        return None
    if kind == "one":
        return torch.ones(1, N).expand(B, N)
    if kind == "whole":
        return torch.randint(1, 9, (N, B), generator=g).float().mT
    return torch.randn(B, N, generator=g).mul(0.5 if kind == "fractional" else 3).exp()


def drawn_places(draw, g, B, P, grid, most):
    """Patches of n tokens, [B, n], for any n in 1..most^2; a cell may be without tokens."""
    patches = grid[0] * grid[1]
    kind = draw(st.sampled_from(["some", "any", "any", "one"]))
    if kind == "some":  # as removing leaves them
        n = draw(st.integers(1, patches))
        return torch.stack([torch.randperm(patches, generator=g)[:n].sort().values for _ in range(B)])
    n = draw(st.integers(1, most**2))
    if kind == "one":
        return torch.randint(0, patches, (B, 1), generator=g).expand(B, n)
    return torch.randint(0, patches, (B, n), generator=g)


@st.composite
def calls(
    draw, dtype=torch.float32, numbers=("normal", "normal", "coarse", "copies", "equal", "zeros"), most=12, merged=False
):
    """Calls of both ops on up to most^2 + 5 tokens. coarse: whole numbers; copies: three different keys; equal: one;
    zeros: half of the queries are 0. merged: with sizes and places."""
    B, H, d = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from(HEAD_SIZES) | st.integers(1, 200))
    grid, P = (draw(st.integers(1, most)), draw(st.integers(1, most))), draw(st.integers(0, 5))
    if P + grid[0] * grid[1] < 2:
        grid = (1, 2)
    N = P + grid[0] * grid[1]
    g = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    size = place = None
    if merged:
        place = drawn_places(draw, g, B, P, grid, most) if draw(st.booleans()) else None
        N = N if place is None else P + place.shape[1]
        size = drawn_sizes(draw, g, B, N)
    q, k, v = layout(draw, g, B, H, N, d, dtype)
    tile = draw(st.sampled_from(TILES))
    budget = st.sampled_from([1, N, max(1, N // 10)]) | st.integers(1, N)
    many, several = draw(st.sampled_from([1, 1, H])), draw(st.sampled_from([1, 1, H]))
    budgets = tuple(draw(budget) for _ in range(many))
    prefix = draw(st.sampled_from([P, P, P, P, N + 2]))
    if place is not None and prefix > P:
        place = place[:, :0]
    cells = tuple((draw(st.integers(1, 6)), draw(st.integers(1, 6))) for _ in range(several))
    spec = Spec(budgets, prefix, draw(st.sampled_from(TAILS)), grid, cells, tile)
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
        coef = (0.4, draw(st.sampled_from([0, 0, 2])), draw(st.sampled_from([0, 0.3, 0.9])))
        w_down, w_up = torch.rand(r, N, generator=g), torch.randn(draw(st.sampled_from([1, H])), r, N, generator=g)
        if kind in ("copies", "equal"):
            w_up = w_up[..., which if kind == "copies" else which * 0]
        c = draw(st.sampled_from([0, 3]))
        channels = [torch.randn(*s, generator=g) for s in ((c, d), (c,), (c, d), (c,))] if c else [None] * 4
        return Call(q, k, v, spec, [r] * H, token=(w_down, w_up, *channels, coef), size=size, place=place)
    r = min(d, 40) if predictor == "folded" else 40
    ranks = draw(st.lists(st.integers(1, r), min_size=H, max_size=H))
    if predictor == "folded":
        return Call(q, k, v, spec, ranks, size=size, place=place)
    a = torch.randn(2, H, d, max(ranks), generator=g) * selection.rank_mask(ranks, q.float())
    return Call(q, k, v, spec, ranks, head=tuple(a.to(dtype)), size=size, place=place)


def oracle(call, kept, a, rounded=False):
    """The equation of tails.py in float64 over these keys and cells [B, H, N, d]; the largest that a row's logits can be
    and whether all are -inf, [B, H, N, 1] each.

    rounded: of q, k and v as bfloat16 stores them. What is not finite counts only where it has weight.
    """
    q, k, v = ((t.bfloat16() if rounded else t).double() for t in (call.q, call.k, call.v))
    logits, values, count = q @ k.mT * call.scale, v, kept.double()
    size = None if call.size is None else call.size.double()[:, None, :, None]  # (B, 1, N, 1)
    if size is not None:
        logits = logits + size.log().mT
    if call.spec.tail != "none":
        m = int(a.max()) + 1
        one = torch.ones_like(k[..., :1]) if size is None else size.expand_as(k[..., :1])
        member = one_hot(a, m) * one  # (B, H, N, m)
        held = member.sum(-2).unsqueeze(-1)
        held = held.masked_fill(held == 0, 1)
        k_mean, v_mean = (tails.cell_sums(t * one, a, m) / held for t in (k, v))
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


def over_tiles(x, call):
    """The largest of x [B, H, n] over the queries of each tile."""
    grid, tile = grid_of(call), call.spec.tile
    t = (torch.arange(grid[0])[:, None] // tile[0] * grid[1] + torch.arange(grid[1]) // tile[1]).flatten()
    t = (t if call.place is None else t[call.place].unsqueeze(1)).expand_as(x)
    return x.new_full((*x.shape[:2], int(t.max()) + 1), -torch.inf).scatter_reduce(2, t, x, "amax").gather(2, t)


def ranking(call):
    """What ranks the keys of the patch rows in float64 (NaN lowest), what rounding to float32 may change of it, and one
    standard deviation: [B, H, n, N], [B, H, n] and [B, H, n]."""
    row, col, _ = (t.double() for t in call.coordinates())
    s = (row @ col.mT)[:, :, call.P :]
    s = s if call.shift is None else s + call.shift.double()[:, None, None]
    sd = s.nan_to_num(0, 0, 0).var(-1, correction=0).sqrt() if s.numel() else s[..., 0]
    row, col = (t.nan_to_num(0, 0, 0).norm(dim=-1) for t in (row, col))
    near = 1e-5 * row[:, :, call.P :] * col.amax(-1, keepdim=True)
    near = near if call.shift is None else near + 1e-6 * call.shift.double().abs().amax(-1)[:, None, None]
    if call.spec.tile and s.shape[2]:
        s = selection.pool_tiles(s, grid_of(call), call.spec.tile, call.place)
        near = (near / sd).nan_to_num(0)
        near = near.masked_fill(near > 0.1, torch.inf)  # scores that differ by rounding alone: any order will do
        near = over_tiles(near, call)
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
    shift = torch.zeros(1, s.shape[-1]) if call.shift is None else call.shift
    first = selection.top_b(shift[:, None, None].expand_as(kept), call.spec.budgets)
    zero = ~row[:, :, call.P :].any(-1)
    if call.spec.tile and s.shape[2]:
        zero = over_tiles((~zero).float(), call) == 0
    zero &= col.isfinite().all(-1).all(-1)[..., None]
    assert torch.equal(kept[zero], first[zero]), "scores are all 0, and not the first keys were kept"
    col = torch.cat([col, shift.expand(col.shape[0], -1)[:, None, :, None].expand_as(col[..., :1])], -1)
    for b, h in torch.cartesian_prod(*map(torch.arange, col.shape[:2])).tolist():
        _, copy = (col[b, h] + 0.0).view(torch.int32).unique(dim=0, return_inverse=True)
        earlier = ((copy[:, None] == copy) & torch.ones(len(copy), len(copy)).tril(-1).bool()).float()  # (N, N)
        skipped = kept[b, h] & (kept[b, h].float() @ earlier.T != earlier.sum(-1))
        assert not bool(skipped.any()), "a key was kept and not its copy of lower index"


def assert_cells(call, a):
    """Cells of the reference in float64, in heads without keys that lie between two of them."""
    (B, H, N, _), P, spec, grid = call.q.shape, call.P, call.spec, grid_of(call)
    if spec.tail == "none" or P == N:
        return
    f = call.coordinates()[2].double()
    weight = torch.ones(B, H, N) if call.size is None else call.size[:, None].expand(B, H, N)
    clear = torch.ones(B, H, dtype=torch.bool)
    if spec.tail == "clusters":
        f = f.nan_to_num(0, 0, 0)
        for h in range(H):
            one = slice(h, h + 1)
            start = tails.grid_cells(grid, of_head(spec.cells, h))
            x, w, m = f[:, one, P:], weight[:, one, P:, None].double(), int(start.max()) + 1
            now = (start if call.place is None else start[call.place].unsqueeze(1)).expand(B, 1, -1)
            for _ in range(tails.LLOYD_STEPS if m > 1 else 0):
                count = tails.cell_sums(w, now, m)
                distance = torch.cdist(x, tails.cell_sums(x * w, now, m) / count.masked_fill(count == 0, 1)).square()
                distance = distance.masked_fill(count.mT == 0, torch.inf)
                two = distance.topk(2, largest=False).values
                clear[:, one] &= (two[..., 1] - two[..., 0] > 1e-5 * x.square().sum(-1).amax(-1, keepdim=True)).all(-1)
                now = distance.argmin(-1)
            assert bool(((a[:, h, P:] >= P) & (a[:, h, P:] < P + m)).all())
    right = assigned(call, f, weight)
    assert torch.equal(a[clear], right[clear]), "another cell"


def assert_reference_right(call):
    """The reference's output is the oracle's, for the keys and cells that its own parts give."""
    row, col, f = call.coordinates()
    grid, s = grid_of(call), (row @ col.mT)[:, :, call.P :]
    s = s if call.shift is None else s + call.shift[:, None, None]
    if call.spec.tile and s.shape[2]:
        s = selection.pool_tiles(s, grid, call.spec.tile, call.place)
    kept = pad(selection.top_b(s, call.spec.budgets), (0, 0, call.P, 0), value=True)
    weight = None if call.size is None else call.size[:, None].expand(f.shape[:3])
    tail = "mean" if call.spec.tail == "none" else call.spec.tail
    right, logit, _ = oracle(call, kept, assigned(call, f, weight, tail))
    assert_near(call.expected(), right, largest(call.v) * (2e-5 + 4e-7 * logit))


def assert_right(call, isa, precision="input"):
    """Keys, cells and output of a call on finite numbers."""
    stored = isa == 3 and (precision == "bf16" or call.q.dtype == torch.bfloat16)
    out, kept, a = call.probe(isa, precision)
    assert out.dtype == call.q.dtype
    assert_highest(call, kept, coarse=stored)
    assert_cells(call, a)
    expected, logit, _ = oracle(call, kept, a, rounded=stored)
    V = largest(call.v)
    one = STORED if call.size is None else 2 * STORED  # the weight of a row's only key is rounded too: it is not 1
    tolerance = V * (one + STORED * logit if stored else 2e-5 + 4e-7 * logit)
    if out.dtype == torch.bfloat16:
        tolerance = tolerance + V * 2**-8
    assert_near(out, expected, tolerance)
    low, high = call.v.double().amin(-2, keepdim=True), call.v.double().amax(-2, keepdim=True)
    slack = V * (2**-7 if stored or out.dtype == torch.bfloat16 else 2e-5)
    assert bool(((out >= low - slack) & (out <= high + slack)).all()), "no mean of values"


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
    return Call(q, k, v, Spec.uniform(budget, 1, tail, (side, side), (4, 3), tile), [16] * H)


def heads(out, call):
    """[B, N, H*d] as [B, H, N, d]."""
    return out.unflatten(-1, (call.q.shape[1], -1)).transpose(1, 2)
