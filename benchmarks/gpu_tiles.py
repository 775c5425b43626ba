"""Prototype of sparse attention for GPUs, in Triton: one set of keys for every tile of queries. No part of the package.

A tile of 64 (8x8) or 128 (8x16) patch queries shares its b keys, so that each is fetched once for all of them. A key's score
is the highest over the rows of (s - mean) / sd, s the predictor's products; a tail of clusters stands for what is dropped:

    prepare (BH), 3 launches  mean and covariance of the keys' first r coordinates; clusters; their mean keys and values
    score (key blocks, T, BH) the pooled score of every key for every tile
    choose (T, BH)            the b highest, ties to the lower index; how many keys of each cell were dropped
    attend (T, BH)            attention of a tile over its keys and cells; and once more for prefix rows, over all keys

Values are those of `sparsify.ops.attention` with `Spec.tile`. `gpu.py` times it against the best dense kernel, which decides
whether it becomes an op. No masks, sizes or places; r at most 64; head sizes that are powers of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Settings(NamedTuple):
    """Constants of a call."""

    rank: int  # r
    budget: int  # b
    prefix: int  # P
    grid: tuple[int, int]  # of the patches
    cells: tuple[int, int]  # of the tail
    tile: tuple[int, int] = (8, 8)
    bits: int = 32  # of a score that are compared: 32 or 16
    quads: bool = False  # score the mean queries of 2x2 patches instead of all queries
    exact: bool = False  # float32 products in full; for tests

    @property
    def tiles(self) -> int:
        """T."""
        return -(-self.grid[0] // self.tile[0]) * -(-self.grid[1] // self.tile[1])

    @property
    def count(self) -> int:
        """M, cells of the patch keys."""
        return min(self.cells[0], self.grid[0]) * min(self.cells[1], self.grid[1])


class Prepared(NamedTuple):
    """What `prepare` finds of each head. CP: P + M, the prefix keys' own cells first."""

    mean: Tensor  # float32 [BH, RP]
    covariance: Tensor  # float32 [BH, RP, RP]
    cell: Tensor  # of every key, int32 [BH, N]
    keys: Tensor  # of the cells, [BH, CP, d]
    values: Tensor
    held: Tensor  # keys in each cell, int32 [BH, CP]


class Chosen(NamedTuple):
    """What `choose` finds of each tile."""

    index: Tensor  # kept keys, ascending, int32 [BH, T, b]
    dropped: Tensor  # keys that the tile dropped of each cell, int32 [BH, T, CP]


NUMBERS = "N P GH GW CH CW M H b T C".split()
"""Arguments whose values do not matter to a kernel: compiled for each kind of value they would take minutes."""


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, s: Settings) -> Tensor:
    """[B, H, N, d] x 3, strided in all but d -> [B, N, H*d]."""
    prepared = prepare(k, v, s)
    return attend(q, k, v, scale, prepared, choose(score(q, k, prepared, s), prepared, s), s)


def prepare(k: Tensor, v: Tensor, s: Settings) -> Prepared:
    B, H, N, d = k.shape
    RP, CP = _power(s.rank), s.prefix + s.count
    new = k.new_empty
    found = Prepared(
        new(B * H, RP, dtype=torch.float32), new(B * H, RP, RP, dtype=torch.float32), new(B * H, N, dtype=torch.int32),
        new(B * H, CP, d), new(B * H, CP, d), new(B * H, CP, dtype=torch.int32),
    )  # fmt: skip
    cells = min(s.cells[0], s.grid[0]), min(s.cells[1], s.grid[1])
    launch(
        _cluster, (B * H,), (k, *found[:3], *k.stride()[:3], N, s.prefix, *s.grid, *cells, H),
        R=s.rank, RP=RP, MP=_power(s.count), BLOCK=32, num_warps=4,
    )  # fmt: skip
    for x, means in ((k, found.keys), (v, found.values)):
        launch(
            _average, (B * H,), (x, found.cell, means, found.held, *x.stride()[:3], N, s.prefix, s.count, H),
            D=d, MP=_power(s.count), BLOCK=64, DOT=_dot(s), num_warps=4,
        )  # fmt: skip
    return found


def score(q: Tensor, k: Tensor, prepared: Prepared, s: Settings) -> Tensor:
    """Pooled scores, float32 [BH, T, N]."""
    B, H, N, _ = q.shape
    pooled = q.new_empty(B * H, s.tiles, N, dtype=torch.float32)
    tensors = (q, k, prepared.mean, prepared.covariance, pooled, *q.stride()[:3], *k.stride()[:3])
    launch(
        _score, (-(-N // 128), s.tiles, B * H), (*tensors, N, s.prefix, *s.grid, H, s.tiles),
        R=s.rank, RP=_power(s.rank), TH=s.tile[0], TW=s.tile[1], QUADS=s.quads, BLOCK=128, DOT=_dot(s), num_warps=4,
    )  # fmt: skip
    return pooled


def choose(pooled: Tensor, prepared: Prepared, s: Settings) -> Chosen:
    heads, T, N = pooled.shape
    CP = prepared.held.shape[1]
    index = torch.empty(heads, T, s.budget, dtype=torch.int32, device=pooled.device)
    dropped = torch.empty(heads, T, CP, dtype=torch.int32, device=pooled.device)
    NP = _power(N)
    launch(
        _choose, (T, heads), (pooled, prepared.cell, index, dropped, N, s.budget, T, CP),
        NP=NP, CPP=_power(CP), BITS=s.bits, num_warps=4 if NP <= 2048 else 8,
    )  # fmt: skip
    return Chosen(index, dropped)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, prepared: Prepared, chosen: Chosen, s: Settings) -> Tensor:
    B, H, N, d = q.shape
    out = q.new_empty(B, N, H * d)
    tensors = (q, k, v, prepared.keys, prepared.values, *chosen, out, scale * 1.4426950408889634)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    numbers = (N, s.prefix, *s.grid, s.budget, s.tiles, prepared.held.shape[1], H)
    for prefix, programs in ((False, s.tiles), (True, 1 if s.prefix else 0)):
        if programs:
            launch(
                _attend, (programs, B * H), (*tensors, *strides, *numbers),
                TH=s.tile[0], TW=s.tile[1], D=d, BLOCK=64, PREFIX=prefix, DOT=_dot(s),
                num_warps=attend_warps(s.tile[0] * s.tile[1], _major(q)), num_stages=2,
            )  # fmt: skip
    return out


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: Any) -> None:
    """Runs a kernel with one program for each cell of `grid`; options: its constants, num_warps and num_stages."""
    kernel[grid](*arguments, **options)


def attend_warps(rows: int, major: int) -> int:
    """Warps of `attend`: on GPUs before Hopper four would spill registers. major: of the compute capability."""
    return 4 if rows <= 64 and major >= 9 else 8


def _major(x: Tensor) -> int:
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _dot(s: Settings) -> str:
    return "ieee" if s.exact else "tf32"


@triton.jit
def _means(total, count):
    return total / tl.maximum(count, 1.0)[:, None]


@triton.jit
def _nearest(features, centre, count, M: tl.constexpr, DOT: tl.constexpr):
    """The cell [BLOCK] with the nearest mean [M, RP]; ties to the lower one, empty ones to none."""
    squares = tl.sum(centre * centre, 1)
    distance = squares[None, :] - 2 * tl.dot(features, tl.trans(centre), input_precision=DOT)
    distance = tl.where((count > 0)[None, :], distance, float("inf"))
    return tl.argmin(distance, 1)


@triton.jit(do_not_specialize=NUMBERS)
def _cluster(
    k, mean, covariance, cell, kb, kh, kn, N, P, GH, GW, CH, CW, H,
    R: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and covariance of the keys, and the cell of each."""
    head = tl.program_id(0)
    k += (head // H).to(tl.int64) * kb + (head % H) * kh
    r, c = tl.arange(0, RP), tl.arange(0, MP)
    at = tl.arange(0, BLOCK)

    total = tl.zeros([RP], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + at
        x = tl.load(k + j[:, None] * kn + r[None, :], (j < N)[:, None] & (r < R)[None, :], 0.0).to(tl.float32)
        total += tl.sum(x, 0)
    middle = total / N
    spread = tl.zeros([RP, RP], tl.float32)
    sums = tl.zeros([MP, RP], tl.float32)
    count = tl.zeros([MP], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + at
        x = tl.load(k + j[:, None] * kn + r[None, :], (j < N)[:, None] & (r < R)[None, :], 0.0).to(tl.float32)
        apart = tl.where((j < N)[:, None], x - middle[None, :], 0.0)
        spread += tl.dot(tl.trans(apart), apart, input_precision="ieee")
        patch = j - P
        a = (patch // GW) * CH // GH * CW + (patch % GW) * CW // GW  # the grid's cells
        member = ((a[:, None] == c[None, :]) & ((patch >= 0) & (j < N))[:, None]).to(tl.float32)
        sums += tl.dot(tl.trans(member), x, input_precision="ieee")
        count += tl.sum(member, 0)
    tl.store(mean + head * RP + r, middle)
    tl.store(covariance + head * RP * RP + r[:, None] * RP + r[None, :], spread / N)

    centre, known = _means(sums, count), count
    sums = tl.zeros([MP, RP], tl.float32)
    count = tl.zeros([MP], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + at
        x = tl.load(k + j[:, None] * kn + r[None, :], (j < N)[:, None] & (r < R)[None, :], 0.0).to(tl.float32)
        a = _nearest(x, centre, known, MP, "ieee")
        member = ((a[:, None] == c[None, :]) & ((j >= P) & (j < N))[:, None]).to(tl.float32)
        sums += tl.dot(tl.trans(member), x, input_precision="ieee")
        count += tl.sum(member, 0)
    centre, known = _means(sums, count), count
    for start in range(0, N, BLOCK):
        j = start + at
        x = tl.load(k + j[:, None] * kn + r[None, :], (j < N)[:, None] & (r < R)[None, :], 0.0).to(tl.float32)
        a = _nearest(x, centre, known, MP, "ieee")
        tl.store(cell + head * N + j, tl.where(j < P, j, a + P), j < N)


@triton.jit(do_not_specialize=NUMBERS)
def _average(
    x, cell, means, held, xb, xh, xn, N, P, M, H,
    D: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Means of keys or values over the cells; each prefix key is its own."""
    head = tl.program_id(0)
    x += (head // H).to(tl.int64) * xb + (head % H) * xh
    d, c, at = tl.arange(0, D), tl.arange(0, MP), tl.arange(0, BLOCK)
    total = tl.zeros([MP, D], tl.float32)
    count = tl.zeros([MP], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + at
        xj = tl.load(x + j[:, None] * xn + d[None, :], (j < N)[:, None], 0.0)
        a = tl.load(cell + head * N + j, j < N, 0) - P
        member = (a[:, None] == c[None, :]) & ((j >= P) & (j < N))[:, None]
        total += tl.dot(tl.trans(member.to(xj.dtype)), xj, input_precision=DOT)
        count += tl.sum(member.to(tl.float32), 0)
        tl.store(means + (head * (P + M) + j[:, None]) * D + d[None, :], xj, (j < P)[:, None])
        tl.store(held + head * (P + M) + j, 1, j < P)
    into = head * (P + M) + P + c
    tl.store(means + into[:, None] * D + d[None, :], _means(total, count).to(means.dtype.element_ty), (c < M)[:, None])
    tl.store(held + into, count.to(tl.int32), c < M)


@triton.jit(do_not_specialize=NUMBERS)
def _score(
    q, k, mean, covariance, pooled, qb, qh, qn, kb, kh, kn, N, P, GH, GW, H, T,
    R: tl.constexpr, RP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    block, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q += (head // H).to(tl.int64) * qb + (head % H) * qh
    k += (head // H).to(tl.int64) * kb + (head % H) * kh
    wide = (GW + TW - 1) // TW
    r, i = tl.arange(0, RP), tl.arange(0, TH * TW)
    quad, part = i // 4, i % 4  # four rows in a row are neighbours, 2x2
    y = tile // wide * TH + quad // (TW // 2) * 2 + part // 2
    x = tile % wide * TW + quad % (TW // 2) * 2 + part % 2
    there = (y < GH) & (x < GW)
    row = tl.load(q + (P + y * GW + x)[:, None] * qn + r[None, :], there[:, None] & (r < R)[None, :], 0.0)
    if QUADS:
        four = tl.sum(tl.reshape(there.to(tl.float32), [TH * TW // 4, 4]), 1)
        summed = tl.sum(tl.reshape(row.to(tl.float32), [TH * TW // 4, 4, RP]), 1)
        row = (summed / tl.maximum(four, 1.0)[:, None]).to(q.dtype.element_ty)
        there = four > 0
    middle = tl.load(mean + head * RP + r)
    spread = tl.load(covariance + head * RP * RP + r[:, None] * RP + r[None, :])
    exact = row.to(tl.float32)
    level = tl.sum(exact * middle[None, :], 1)
    variance = tl.sum(tl.dot(exact, spread, input_precision="ieee") * exact, 1)
    steep = tl.where(variance > 0, 1 / tl.sqrt(tl.maximum(variance, 1e-38)), 1.0)
    j = block * BLOCK + tl.arange(0, BLOCK)
    col = tl.load(k + j[:, None] * kn + r[None, :], (j < N)[:, None] & (r < R)[None, :], 0.0)
    z = (tl.dot(row, tl.trans(col), input_precision=DOT) - level[:, None]) * steep[:, None]
    z = tl.where(there[:, None], z, float("-inf"))
    tl.store(pooled + (head.to(tl.int64) * T + tile) * N + j, tl.max(z, 0), j < N)


@triton.jit(do_not_specialize=NUMBERS)
def _choose(
    pooled, cell, index, dropped, N, b, T, C, NP: tl.constexpr, CPP: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    at = head.to(tl.int64) * T + tile
    j = tl.arange(0, NP)
    z = tl.load(pooled + at * N + j, j < N, float("-inf"))
    bits = z.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered as the scores are
    order = tl.where((z == z) & (j < N), order, -2147483648)  # NaN is lowest; what is not there has higher indices
    if BITS == 16:
        order = order & -65536
    least = tl.where(tl.sum((order >= 0).to(tl.int32), 0) >= b, 0, -2147483648)
    for step in range(1, BITS):
        tried = least | (1 << (31 - step))
        least = tl.where(tl.sum((order >= tried).to(tl.int32), 0) >= b, tried, least)
    above, tie = order > least, (order == least) & (j < N)
    free = b - tl.sum(above.to(tl.int32), 0)
    kept = above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= free))
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(index + at * b + place, j, kept)
    a = tl.load(cell + head * N + j, j < N, 0)
    c = tl.arange(0, CPP)
    tl.store(dropped + at * C + c, tl.histogram(a, CPP, mask=(j < N) & ~kept), c < C)


@triton.jit
def _online(q, k, v, bias, top, total, out, scale, DOT: tl.constexpr):
    """One block of keys into a running softmax; bias: of each key, in the logarithm to base 2, -inf for none."""
    s = tl.dot(q, tl.trans(k), input_precision=DOT) * scale + bias[None, :]
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - safe[:, None])
    factor = tl.exp2(tl.where(top == float("-inf"), 0.0, top) - safe)
    return new, total * factor + tl.sum(p, 1), out * factor[:, None] + tl.dot(p.to(v.dtype), v, input_precision=DOT)


@triton.jit(do_not_specialize=NUMBERS)
def _attend(
    q, k, v, keys, values, index, dropped, to, scale, qb, qh, qn, kb, kh, kn, vb, vh, vn, N, P, GH, GW, b, T, C, H,
    TH: tl.constexpr, TW: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PREFIX: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile over its keys and the cells; PREFIX: the prefix rows over all keys."""
    tile, head = tl.program_id(0), tl.program_id(1)
    image = (head // H).to(tl.int64)
    q += image * qb + (head % H) * qh
    k += image * kb + (head % H) * kh
    v += image * vb + (head % H) * vh
    wide = (GW + TW - 1) // TW
    i, d, at = tl.arange(0, TH * TW), tl.arange(0, D), tl.arange(0, BLOCK)
    y, x = tile // wide * TH + i // TW, tile % wide * TW + i % TW
    row, there, count = P + y * GW + x, (y < GH) & (x < GW), b
    if PREFIX:
        row, there, count = i, i < P, N
    mine = tl.load(q + row[:, None] * qn + d[None, :], there[:, None], 0.0)
    top = tl.full([TH * TW], float("-inf"), tl.float32)
    total = tl.zeros([TH * TW], tl.float32)
    out = tl.zeros([TH * TW, D], tl.float32)
    own = head.to(tl.int64) * T + tile
    for start in range(0, count, BLOCK):
        n = start + at
        j = n if PREFIX else tl.load(index + own * b + n, n < b, 0)
        kj = tl.load(k + j[:, None] * kn + d[None, :], (n < count)[:, None], 0.0)
        vj = tl.load(v + j[:, None] * vn + d[None, :], (n < count)[:, None], 0.0)
        bias = tl.where(n < count, 0.0, float("-inf"))
        top, total, out = _online(mine, kj, vj, bias, top, total, out, scale, DOT)
    for start in range(0, 0 if PREFIX else C, BLOCK):
        c = start + at
        from_ = (head * C + c[:, None]) * D + d[None, :]
        kc = tl.load(keys + from_, (c < C)[:, None], 0.0)
        vc = tl.load(values + from_, (c < C)[:, None], 0.0)
        m = tl.load(dropped + own * C + c, c < C, 0).to(tl.float32)
        bias = tl.where(m > 0, tl.log2(tl.maximum(m, 1.0)), float("-inf"))
        top, total, out = _online(mine, kc, vc, bias, top, total, out, scale, DOT)
    out = out / total[:, None]
    to += (image * N * H + head % H) * D
    tl.store(to + row[:, None] * H * D + d[None, :], out.to(to.dtype.element_ty), there[:, None])
