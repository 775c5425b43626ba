"""Merging and ranking of tokens in Triton; `sparsify.nn.merging` and `sparsify.nn.tokens` are the reference.

A round of merging is rank, nearest, plan, merge; a stage of evit is choose, merge. A position is a place in the order of
rising importance. No kernel reads what it wrote itself.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(values):
    """float32 as uint32 in the same order; 0 and -0 are equal, NaN is the highest."""
    bits = tl.where(values != values, 0x7FC00000, (values + 0.0).to(tl.int32, bitcast=True))
    return tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def lowest(keys, count):
    """Which are the `count` lowest of uint32 keys [n], count <= n; equal ones by their index."""
    border = tl.zeros([], tl.uint32)  # the count-th lowest key, bit by bit: fewer than count are below it
    for i in tl.static_range(32):
        trial = border | tl.full([], 1 << (31 - i), tl.uint32)
        border = tl.where(tl.sum((keys < trial).to(tl.int32), 0) < count, trial, border)
    below, equal = (keys < border).to(tl.int32), (keys == border).to(tl.int32)
    return (below + equal * (tl.cumsum(equal, 0) <= count - tl.sum(below, 0)).to(tl.int32)) > 0


@triton.jit(do_not_specialize=["n", "P"])
def rank(
    x, I, ranks, order, inverse, n, P,
    C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Place of each token in the order of rising importance, equal ones by their index, and 1 / |x_j|.

        rank_i = #{j: I_j < I_i or (I_j = I_i and j < i)},      order[rank_i] = i

    Grid: (n / ROWS, B).

    x [B, P + n, C], I float32 [B, n]; ranks, order int32 [B, n]; inverse float32 [B, n].
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image = tl.program_id(1).to(tl.int64)
    own = ordered(tl.load(I + image * n + i, mask=i < n, other=0.0))
    lower = tl.zeros([ROWS], tl.int32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other = ordered(tl.load(I + image * n + j, mask=j < n, other=0.0))
        first = (other[None] < own[:, None]) | ((other[None] == own[:, None]) & (j[None] < i[:, None]))
        lower += tl.sum((first & (j < n)[None]).to(tl.int32), 1)
    tl.store(ranks + image * n + i, lower, mask=i < n)
    tl.store(order + image * n + lower, i, mask=i < n)
    squares = tl.zeros([ROWS, BC], tl.float32)
    rows = x + (image * (P + n) + P + i)[:, None] * C
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        part = tl.load(rows + c[None], mask=(i < n)[:, None] & (c < C)[None], other=0.0).to(tl.float32)
        squares += part * part
    length = tl.maximum(tl.sqrt_rn(tl.sum(squares, 1)), 1e-12)
    tl.store(inverse + image * n + i, tl.div_rn(tl.full([ROWS], 1.0, tl.float32), length), mask=i < n)


@triton.jit(do_not_specialize=["n", "P", "count"])
def nearest(
    x, I, order, inverse, near, cost, n, P, count,
    C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For each of the first `count` positions p the later one with the highest cosine, and what merging into it costs.

        near_p = argmax_{t > p} x_p . x_t / (|x_p| |x_t|), the lowest of equal ones;    cost_p = (1 - highest cosine) I_p

    Grid: (count / ROWS, B).

    x [B, P + n, C], I, inverse float32 [B, n], order int32 [B, n]: see `rank`; near int32, cost float32 [B, count]. Products
    are those of the dtype of x, summed in float32; lengths are float32.
    """
    first = tl.program_id(0) * ROWS
    image = tl.program_id(1).to(tl.int64)
    p = first + tl.arange(0, ROWS)
    token = tl.load(order + image * n + p, mask=p < n, other=0)
    base = image * (P + n) + P
    own = x + (base + token)[:, None] * C
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    at = p + 1
    for start in range(first, n, BLOCK):
        t = start + tl.arange(0, BLOCK)
        other = tl.load(order + image * n + t, mask=t < n, other=0)
        theirs = x + (base + other)[None] * C
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for begin in range(0, C, BC):
            c = begin + tl.arange(0, BC)
            if C % BC == 0:
                a, b = tl.load(own + c[None]), tl.load(theirs + c[:, None])
            else:
                a = tl.load(own + c[None], mask=(c < C)[None], other=0.0)
                b = tl.load(theirs + c[:, None], mask=(c < C)[:, None], other=0.0)
            products = tl.dot(a, b, products, input_precision=PRECISION)
        products *= tl.load(inverse + image * n + other)[None]
        later = (t[None] > p[:, None]) & (t < n)[None]
        best, index = tl.max(tl.where(later, products, float("-inf")), 1, return_indices=True)
        at = tl.where(best > highest, start + index, at)
        highest = tl.maximum(highest, best)
    looks = p < count
    cosine = highest * tl.load(inverse + image * n + token)
    tl.store(near + image * count + p, at, mask=looks)
    tl.store(cost + image * count + p, (1.0 - cosine) * tl.load(I + image * n + token), mask=looks)


@triton.jit(do_not_specialize=["n", "count", "r", "steps"])
def plan(ranks, order, near, cost, keep, group, n, count, r, steps, NP: tl.constexpr):
    """The r of the first `count` positions with the lowest cost leave; where each token goes, and who stays.

    Grid: (B).

    ranks, order int32 [B, n]: see `rank`; near int32, cost float32 [B, count]: see `nearest`; keep int64 [B, n - r], group
    int64 [B, n]: see `sparsify.nn.merging.matching`. steps: 2^steps is the longest chain or more. NP: n, padded.
    """
    image = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NP)  # a position, then a token
    looks, there = i < count, i < n
    costs = ordered(tl.load(cost + image * count + i, mask=looks, other=0.0))
    leaves = lowest(tl.where(looks, costs, 0xFFFFFFFF).to(tl.uint32), r)
    into = tl.where(leaves, tl.load(near + image * count + i, mask=looks, other=0), i)
    for _ in range(steps):
        into = tl.gather(into, into, 0)
    position = tl.load(ranks + image * n + i, mask=there, other=0)
    stays = there & (tl.gather(leaves.to(tl.int32), position, 0) == 0)
    place = tl.cumsum(stays.to(tl.int32), 0) - 1
    root = tl.load(order + image * n + tl.gather(into, position, 0), mask=there, other=0)
    tl.store(keep + image * (n - r) + place, i.to(tl.int64), mask=stays)
    tl.store(group + image * n + i, tl.gather(place, root, 0).to(tl.int64), mask=there)


@triton.jit(do_not_specialize=["n", "m"])
def choose(I, keep, group, n, m, FUSE: tl.constexpr, NP: tl.constexpr):
    """The m most important tokens, equal ones by their index; with FUSE the next one stands for all others.

    Grid: (B).

    I float32 [B, n]; keep int64 [B, m + FUSE], group int64 [B, n]: see `sparsify.nn.tokens.ranking`. NP: n, padded.
    """
    image = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NP)
    there = i < n
    falling = 0xFFFFFFFF - ordered(tl.load(I + image * n + i, mask=there, other=0.0))
    keys = tl.where(there, falling, 0xFFFFFFFF).to(tl.uint32)
    stays = lowest(keys, m)
    others = tl.full([], -1, tl.int32)
    if FUSE:
        more = lowest(keys, m + 1)
        place = tl.cumsum(more.to(tl.int32), 0) - 1
        others = tl.sum(tl.where(more & ~stays, place, 0), 0)
    else:
        more = stays
        place = tl.cumsum(more.to(tl.int32), 0) - 1
    tl.store(keep + image * (m + FUSE) + place, i.to(tl.int64), mask=more)
    tl.store(group + image * n + i, tl.where(stays, place, others).to(tl.int64), mask=there)


@triton.jit(do_not_specialize=["n", "m", "P"])
def merge(
    x, I, size, place, keep, group, new_x, new_I, new_size, new_place, n, m, P,
    C: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr, MEMBERS: tl.constexpr,
    SIZED: tl.constexpr, PLACED: tl.constexpr, GROUPED: tl.constexpr, MERGES: tl.constexpr,
):  # fmt: skip
    """The tokens that remain: means of their groups, weighted with I, and with MERGES their importance and size.

        x_g = sum_j w_j x_j,    w_j = I_j / I_g,    I_g = sum_j I_j,    s_g = I_g e^(-sum_j w_j log(I_j / s_j))

    Grid: (P + m, B): the first P programs copy prefix tokens. A token alone in its group is copied too.

    x [B, P + n, C] -> new_x [B, P + m, C]; I float32 [B, n] -> new_I [B, m]; size float32 [B, P + n] where SIZED, else all
    1 -> new_size [B, P + m]; place int64 [B, n] where PLACED, else 0 to n - 1 -> new_place [B, m]; keep int64 [B, m], group
    int64 [B, n]: see `plan`, `choose`; without GROUPED every token is alone. CP: C, padded; BLOCK: tokens searched for
    members at once; MEMBERS: rows added at once.
    """
    row, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CP)
    inside = c < C
    source, target = x + image * (P + n) * C, new_x + (image * (P + m) + row) * C
    group += image * n
    I += image * n
    size += image * (P + n)
    if row < P:
        tl.store(target + c, tl.load(source + row * C + c, mask=inside), mask=inside)
        if MERGES:
            own = tl.full([], 1.0, tl.float32)
            if SIZED:
                own = tl.load(size + row)
            tl.store(new_size + image * (P + m) + row, own)
    else:
        g = row - P
        kept = tl.load(keep + image * m + g)
        position = kept
        if PLACED:
            position = tl.load(place + image * n + kept)
        tl.store(new_place + image * m + g, position)
        count = 1
        total = tl.full([], 0.0, tl.float32)
        if GROUPED:
            members = tl.zeros([BLOCK], tl.int32)
            totals, logarithms = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for start in range(0, n, BLOCK):
                j = start + tl.arange(0, BLOCK)
                member = tl.load(group + j, mask=j < n, other=-1) == g
                weight = tl.load(I + j, mask=member, other=0.0)
                members += member.to(tl.int32)
                totals += weight
                if MERGES:
                    ratio = tl.where(member, weight, 1.0)
                    if SIZED:
                        ratio /= tl.load(size + P + j, mask=member, other=1.0)
                    logarithms += weight * tl.log(ratio)
            count = tl.sum(members, 0)
            total = tl.sum(totals, 0)
            if MERGES:
                tl.store(new_I + image * m + g, total)
                tl.store(new_size + image * (P + m) + row, total * tl.exp(-tl.sum(logarithms, 0) / total))
        if count == 1:
            tl.store(target + c, tl.load(source + (P + kept) * C + c, mask=inside), mask=inside)
        else:
            mean = tl.zeros([MEMBERS, CP], tl.float32)
            for start in range(0, n, BLOCK):
                i = start + tl.arange(0, BLOCK)
                member = tl.load(group + i, mask=i < n, other=-1) == g
                slot = tl.cumsum(member.to(tl.int32), 0) - 1
                for first in range(0, tl.sum(member.to(tl.int32), 0), MEMBERS):
                    found = member[:, None] & (slot[:, None] == first + tl.arange(0, MEMBERS)[None])  # (BLOCK, MEMBERS)
                    j = tl.sum(tl.where(found, i[:, None] + 1, 0), 0) - 1  # -1: no more
                    w = tl.load(I + j, mask=j >= 0, other=0.0) / total
                    there = (j >= 0)[:, None] & inside[None]
                    rows = tl.load(source + (P + j)[:, None] * C + c[None], mask=there, other=0.0)
                    mean += rows.to(tl.float32) * w[:, None]
            tl.store(target + c, tl.sum(mean, 0).to(new_x.dtype.element_ty), mask=inside)
