"""The ops against loops written from the equations, over drawn shapes, masks and ties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.op_calls import head_lowrank, head_ranking, op, token_lowrank, token_ranking
from sparsify.ops import attention, reference, selection, tails
from sparsify.ops.selection import Context
from sparsify.ops.spec import Spec, budget, of_head

TAILS = ["none", "mean", "cells", "clusters"]


@st.composite
def problems(draw):
    """Small inputs of the op; a third of them with coarse values, so that scores tie."""
    B, H = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    prefix = draw(st.integers(0, 3))
    N, d = prefix + grid[0] * grid[1], draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    q, k, v = torch.randn(3, B, H, N, d, generator=generator, dtype=torch.float64)
    if draw(st.integers(0, 2)) == 0:
        q, k = q.round(), k.round()
    tile = draw(st.sampled_from([(), (2, 2)]))
    cells = tuple(draw(of_heads(st.tuples(st.integers(1, 3), st.integers(1, 3)), H)))
    return dict(
        q=q, k=k, v=v, ranks=draw(st.lists(st.integers(1, d), min_size=H, max_size=H)),
        budgets=tuple(draw(of_heads(st.integers(1, N), H))), prefix=prefix, tail=draw(st.sampled_from(TAILS)), grid=grid,
        cells=cells, tile=tile,
    )  # fmt: skip


def of_heads(values, H):
    """Lists of one value for all heads, or of one for each."""
    return st.lists(values, min_size=1, max_size=1) | st.lists(values, min_size=H, max_size=H)


def attend(p, mask=None, a_q=None, a_k=None):
    spec = Spec(*(p[name] for name in ("budgets", "prefix", "tail", "grid", "cells", "tile")))
    scale = p["q"].shape[-1] ** -0.5
    return head_lowrank(p["q"], p["k"], p["v"], a_q, a_k, mask, p.get("size"), p.get("place"), p["ranks"], scale, spec)


def by_hand(p, mask=None, cell=None):
    """The docstring of `tails.py`, one row at a time: [B, N, H*d]."""
    q, k, v = p["q"], p["k"], p["v"]
    B, H, N, d = q.shape
    P, scale = p["prefix"], d**-0.5
    out = torch.zeros(B, N, H, d, dtype=q.dtype)
    size = p["size"] if "size" in p else torch.ones(B, N, dtype=q.dtype)
    alive = torch.ones(B, H, N) if mask is None else mask.expand(B, H, N, N).any(-2).double()
    if cell is None and p["tail"] != "none":
        features = k * selection.rank_mask([*p["ranks"], d], k)[:-1]
        tail, heads = tails.TAILS[p["tail"]], [slice(h, h + 1) for h in range(H)]
        each = [tail.assign(features[:, h], alive[:, h], P, p["grid"], of_head(p["cells"], h.start)) for h in heads]
        cell = torch.cat(each, 1)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                allowed = [j for j in range(N) if mask is None or bool(mask.expand(B, H, N, N)[b, h, i, j])]
                r, s = p["ranks"][h], size[b]
                scores = [float(q[b, h, i, :r] @ k[b, h, j, :r]) * scale + math.log(s[j]) for j in range(N)]
                order = sorted(range(N), key=lambda j: (-scores[j] if j in allowed else math.inf, j))
                kept = list(range(N)) if i < P else order[: of_head(p["budgets"], h)]
                kept = [j for j in kept if j in allowed]
                terms = [(float(s[j]), float(q[b, h, i] @ k[b, h, j]) * scale, v[b, h, j]) for j in kept]
                for c in set() if cell is None else set(cell[b, h].tolist()):
                    members = [j for j in allowed if cell[b, h, j] == c]
                    dropped = [j for j in members if j not in kept]
                    if dropped:
                        share = (s[members] / s[members].sum()).unsqueeze(-1)
                        logit = float(q[b, h, i] @ (share * k[b, h, members]).sum(0)) * scale
                        terms.append((float(s[dropped].sum()), logit, (share * v[b, h, members]).sum(0)))
                z = sum(m * math.exp(s) for m, s, _ in terms)
                for m, s, value in terms:
                    out[b, i, h] += m * math.exp(s) / z * value
    return out.flatten(2)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_reference_equals_the_equation(p):
    p["tile"] = ()
    torch.testing.assert_close(attend(p), by_hand(p))


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(0, 10_000))
def test_masked_keys_are_neither_kept_nor_in_the_tail(p, seed):
    p["tile"] = ()
    B, H, N, _ = p["q"].shape
    mask = torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(seed)) < 0.7
    torch.testing.assert_close(attend(p, mask), by_hand(p, mask))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_budget_n_equals_dense_attention(p):
    p["budgets"] = (p["q"].shape[2],)
    dense = torch.nn.functional.scaled_dot_product_attention(p["q"], p["k"], p["v"]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(p), dense)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_budget_one_less_drops_the_lowest_scored_key(p):
    N = p["q"].shape[2]
    if N < 2 or p["prefix"] == N:
        return
    p |= dict(budgets=(N - 1,), tail="none", tile=())
    d, P = p["q"].shape[-1], p["prefix"]
    scores = p["q"] @ (p["k"] * selection.rank_mask([*p["ranks"], d], p["k"])[:-1]).mT
    lowest = N - 1 - scores.flip(-1).argmin(-1)  # of equal scores the higher index goes
    logits = (p["q"] @ p["k"].mT) * d**-0.5
    logits[:, :, P:] = logits[:, :, P:].scatter(-1, lowest[:, :, P:, None], -torch.inf)
    torch.testing.assert_close(attend(p), (logits.softmax(-1) @ p["v"]).transpose(1, 2).flatten(2))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10_000), st.data())
def test_top_b_keeps_exactly_b_and_breaks_ties_by_the_lower_index(n, seed, data):
    b = data.draw(st.integers(1, n))
    s = torch.randint(-2, 3, (4, n), generator=torch.Generator().manual_seed(seed)).float()
    s[0, : n // 2], s[1] = -torch.inf, torch.nan
    kept = selection.top_b(s, b)
    for row, chosen in zip(s.nan_to_num(nan=-torch.inf, neginf=-torch.inf).tolist(), kept, strict=True):
        assert chosen.nonzero().flatten().tolist() == sorted(sorted(range(n), key=lambda j: (-row[j], j))[:b])


def test_queries_of_a_tile_share_their_keys():
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 16, 17)
    pooled = selection.pool_tiles(scores, (4, 4), (2, 2))
    assert torch.equal(pooled[:, :, 0], pooled[:, :, 5]) and not torch.equal(pooled[:, :, 0], pooled[:, :, 2])
    z = (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True, correction=0)
    torch.testing.assert_close(pooled[:, :, 0], z[:, :, [0, 1, 4, 5]].amax(2))


def test_a_tile_does_not_see_the_scale_of_its_rows_nor_keys_that_none_may_attend_to():
    torch.manual_seed(0)
    scores = torch.randn(1, 1, 4, 5)
    scaled = scores * torch.tensor([1.0, 10.0, 0.1, 5.0])[:, None] + torch.tensor([0.0, 3.0, -2.0, 9.0])[:, None]
    torch.testing.assert_close(
        *(selection.pool_tiles(s, (2, 2), (2, 2)) for s in (scores, scaled)), atol=1e-5, rtol=1e-4
    )
    scores[..., 3] = -torch.inf
    pooled = selection.pool_tiles(scores, (2, 2), (2, 2))
    assert (pooled[..., 3] == -torch.inf).all() and pooled[..., :3].isfinite().all()
    assert not selection.pool_tiles(torch.ones(1, 1, 4, 5), (2, 2), (2, 2)).any()  # equal scores: no key ahead


def test_a_row_that_may_attend_to_nothing_gives_zero():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[3] = False
    for tail in TAILS:
        out = head_lowrank(q, k, v, None, None, mask, None, None, [2], 0.5, (2, 1, tail, (2, 2), (2, 2), ()))
        assert out.isfinite().all() and not out[0, 3].any() and out[0, 2].any()


def test_a_nan_key_reaches_the_rows_that_see_it_and_not_silently_fewer_keys():
    q, k, v = torch.randn(3, 1, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    k[0, 0, 2] = torch.nan
    kept = selection.top_b(q @ k.mT, 2)
    assert not kept[..., 2].any() and (kept.sum(-1) == 2).all()


@pytest.mark.parametrize("tail", TAILS)
def test_chunks_of_rows_do_not_change_the_result(tail, monkeypatch):
    q, k, v = torch.randn(3, 2, 2, 17, 8, generator=torch.Generator().manual_seed(1))
    arguments = (None, None, None, None, None, [4, 2], 0.3, (3, 1, tail, (4, 4), (2, 2), (2, 2)))
    whole = head_lowrank(q, k, v, *arguments)
    monkeypatch.setattr(reference, "CHUNK", 100)
    torch.testing.assert_close(head_lowrank(q, k, v, *arguments), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    q, k, v = torch.randn(3, 1, 2, 17, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    arguments = (None, None, None, None, None, [4, 2], 0.3, (3, 1, "clusters", (4, 4), (2, 2), ()))
    half = head_lowrank(q, k, v, *arguments)
    full = head_lowrank(q.float(), k.float(), v.float(), *arguments)
    assert half.dtype == dtype and torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_papers_predictor_ranks_half_precision_in_float32(dtype):
    q, k, v, w_down, w_up, *reduce = token_inputs(torch.float32, grid=(5, 5), d=8, c=3)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    arguments = (w_down, w_up, reduce, None, None, None, 0.3, (0.4, 2), (3, 1, "clusters", (5, 5), (2, 2), ()))
    half, full = (token_lowrank(*tensors, *arguments) for tensors in ((q, k, v), (q.float(), k.float(), v.float())))
    assert half.dtype == dtype and torch.equal(half, full.to(dtype))


def test_gradients_are_those_of_the_reference():
    torch.manual_seed(0)
    q, k, v, a = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(4))
    a_q = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)

    def f(q, k, v, a_q):
        spec = (3, 1, "mean", (2, 2), (1, 1), ())
        return head_lowrank(q, k, v, a_q, a_q, None, None, None, [2, 2], 0.5, spec)

    assert torch.autograd.gradcheck(f, (q, k, v, a_q), atol=1e-6)


def token_inputs(dtype=torch.float64, B=2, H=2, grid=(3, 3), P=1, d=4, r=5, c=None):
    g = torch.Generator().manual_seed(3)
    N = P + grid[0] * grid[1]
    q, k, v = torch.randn(3, B, H, N, d, generator=g, dtype=dtype)
    w_down, w_up = torch.rand(r, N, generator=g, dtype=dtype), torch.randn(H, r, N, generator=g, dtype=dtype)
    reduce = [torch.randn(*s, generator=g, dtype=dtype) for s in ((c, d), (c,), (c, d), (c,))] if c else [None] * 4
    return q, k, v, w_down, w_up, *reduce


@pytest.mark.parametrize("c", [None, 3])
@pytest.mark.parametrize("topk,threshold", [(2, 0.0), (0, 0.15), (0, 0.0)])
def test_token_lowrank_scores_are_the_papers(c, topk, threshold):
    q, k, v, w_down, w_up, *reduce = token_inputs(c=c)
    spec = (3, 1, "none", (3, 3), (1, 1), ())
    out = token_lowrank(q, k, v, w_down, w_up, reduce, None, None, None, 0.5, (0.4, topk, threshold), spec)
    w_q, b_q, w_k, b_k = reduce
    small_q, small_k = (q, k) if c is None else (q @ w_q.T + b_q, k @ w_k.T + b_k)
    a_down = ((small_q @ (w_down @ small_k).mT) * 0.4).softmax(-1)  # (B, H, N, r)
    if topk:
        a_down = a_down * (a_down >= a_down.sort(-1, descending=True).values[..., topk - 1 : topk])
    elif threshold:
        a_down = torch.nn.functional.threshold(a_down, threshold, 0.0)
    scores = a_down @ w_up  # (B, H, N, N)
    kept = scores >= scores.sort(-1, descending=True).values[..., 2:3]
    kept[:, :, 0] = True
    expected = ((q @ k.mT) * 0.5).masked_fill(~kept, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2))


def test_registered_ops_pass_torch_library_opcheck():
    q, k, v, w_down, w_up, *reduce = token_inputs(torch.float32)
    size, place = torch.rand(2, 10) + 0.5, torch.stack([torch.randperm(9) for _ in range(2)])
    head = head_ranking(q, k, None, None, size, [2, 1], 0.5)
    token = token_ranking(q, k, w_down, w_up, reduce, None, 0.4, 2)
    where = Context(None, size, place)
    cell = tails.TAILS["cells"].assign(k, None, 1, (3, 3), (2, 2))
    for ranking, context, constants in (
        (head, where, ([3, 4], 1, "clusters", [3, 3], [2, 2, 1, 2], [])),
        (token, where, ([3], 1, "cells", [3, 3], [2, 2], [2, 2])),
        (head, where._replace(cell=cell), ([3], 1, tails.ASSIGNED, [3, 3], [1, 4], [])),
    ):
        arguments = (q, k, v, *ranking[:4], *context, ranking.ranked, list(ranking.ranks), 0, *constants, 0.5)
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(attention.sparse_attention, arguments, test_utils=checks)


@st.composite
def reduced_problems(draw):
    """Problems where only some patches of the grid are present, in any order, and keys have sizes; no ties."""
    p = draw(problems())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    B, H, N, d = p["q"].shape
    P, patches = p["prefix"], N - p["prefix"]
    n = draw(st.integers(1, patches))
    p["q"], p["k"], p["v"] = torch.randn(3, B, H, P + n, d, generator=generator, dtype=torch.float64)
    p["place"] = torch.stack([torch.randperm(patches, generator=generator)[:n] for _ in range(B)])
    p["size"] = torch.randint(1, 5, (B, P + n), generator=generator).double()
    if draw(st.booleans()):
        p["size"] += torch.rand(B, P + n, generator=generator)
    return p | {"budgets": tuple(draw(of_heads(st.integers(1, P + n), H))), "tile": ()}


def cells_by_hand(p, mask=None):
    """Cells of the keys by the docstrings of `tails.py`, one key at a time: [B][H][N], prefix keys their own; or None."""
    P, (h, w) = p["prefix"], p["grid"]
    B, H, N, _ = p["k"].shape
    if p["tail"] == "none":
        return None
    found = torch.arange(N).expand(B, H, N).clone()
    for b, head in ((b, head) for b in range(B) for head in range(H)):
        rows, cols = (min(asked, sides) for asked, sides in zip(of_head(p["cells"], head), p["grid"], strict=True))
        where = [int(j) for j in p["place"][b]]
        a = [0 if p["tail"] == "mean" else (j // w * rows // h) * cols + j % w * cols // w for j in where]
        f = p["k"][b, head, P:, : p["ranks"][head]]
        s = p["size"][b, P:]
        if mask is not None:
            s = s * mask.expand(B, H, N, N)[b, head].any(0)[P:]
        for _ in range(tails.LLOYD_STEPS if p["tail"] == "clusters" else 0):
            members = {c: [j for j in range(N - P) if a[j] == c and s[j] > 0] for c in sorted(set(a))}
            means = {c: (s[js, None] * f[js]).sum(0) / s[js].sum() for c, js in members.items() if js}
            a = (
                [min(means, key=lambda c: float((f[j] - means[c]).square().sum())) for j in range(N - P)]
                if means
                else a
            )
        found[b, head, P:] = torch.tensor(a) + P
    return found


def rows_of(p, mask_seed):
    """A mask that leaves each query about 7 of 10 keys; None for no seed."""
    B, _, N, _ = p["q"].shape
    return (
        None if mask_seed is None else torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(mask_seed)) < 0.7
    )


MASKS = st.none() | st.integers(0, 10_000)


@settings(max_examples=60, deadline=None)
@given(reduced_problems(), MASKS)
def test_reference_equals_the_equation_with_sizes_and_places(p, mask_seed):
    mask = rows_of(p, mask_seed)
    torch.testing.assert_close(attend(p, mask), by_hand(p, mask, cells_by_hand(p, mask)))


@pytest.mark.parametrize("seed", range(3))
def test_sizes_count_in_the_means_of_clusters(seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, 31, 4, generator=g, dtype=torch.float64)
    p = dict(
        q=q, k=k, v=v, ranks=[2, 3], budgets=(3,), prefix=1, tail="clusters", grid=(6, 6), cells=((3, 3),), tile=()
    )
    p |= dict(place=torch.randperm(36, generator=g)[None, :30], size=torch.rand(1, 31, generator=g).double() * 20 + 0.1)
    cells = cells_by_hand(p)
    assert not torch.equal(cells, cells_by_hand(p | {"size": torch.ones(1, 31)}))
    torch.testing.assert_close(attend(p), by_hand(p, None, cells))


@settings(max_examples=60, deadline=None)
@given(problems(), MASKS, st.booleans(), st.data())
def test_a_key_of_size_c_is_c_equal_keys(p, mask_seed, additive, data):
    B, H, N, d = p["q"].shape
    P = p["prefix"]
    count = torch.tensor(data.draw(st.lists(st.integers(1, 3), min_size=N, max_size=N)))
    copies = torch.arange(N).repeat_interleave(count)
    mask = rows_of(p, mask_seed)
    if mask is not None and additive:
        mask = torch.where(
            mask, torch.randn(mask.shape, dtype=torch.float64, generator=torch.manual_seed(0)), -torch.inf
        )
    many = (
        p
        | {name: p[name][:, :, copies] for name in "qkv"}
        | {"budgets": (len(copies),), "prefix": int(count[:P].sum())}
    )
    many["place"] = (copies[copies >= P] - P).expand(B, -1)
    each = attend(many, None if mask is None else mask[:, :, copies][..., copies])
    one = attend(p | {"size": count.double().expand(B, N), "budgets": (N,)}, mask)
    torch.testing.assert_close(one[:, copies], each)


@settings(max_examples=60, deadline=None)
@given(reduced_problems(), st.sampled_from([(), (2, 2)]), st.integers(0, 10_000))
def test_the_order_of_the_patch_tokens_means_nothing(p, tile, seed):
    B, H, N, _ = p["q"].shape
    P = p["prefix"]
    p["tile"] = tile if N > 2 else ()  # two scores in standard deviations are 1 and -1: ties
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(N - P, generator=generator) for _ in range(B)])  # (B, n)
    full = torch.cat([torch.arange(P).expand(B, P), order + P], 1)
    image = torch.arange(B)[:, None]
    moved = {name: p[name].transpose(1, 2)[image, full].transpose(1, 2) for name in "qkv"}
    moved |= {"size": p["size"][image, full], "place": p["place"][image, order]}
    torch.testing.assert_close(attend(p | moved), attend(p)[image, full])


@settings(max_examples=60, deadline=None)
@given(reduced_problems(), st.sampled_from([(), (2, 2)]))
def test_tokens_that_left_are_keys_that_nobody_sees(p, tile):
    """Every tail and tile: as the full grid with the rows and columns of the others masked, at the same budget."""
    B, H, N, d = p["q"].shape
    p["tile"] = tile if N > 2 else ()  # two scores in standard deviations are 1 and -1: ties
    P, patches = p["prefix"], p["grid"][0] * p["grid"][1]
    where = torch.cat([torch.arange(P).expand(B, P), p["place"] + P], 1)  # (B, N)
    image = torch.arange(B)[:, None]
    full = {name: torch.full((B, P + patches, H, d), 0.5, dtype=torch.float64) for name in "qkv"}
    for name in "qkv":
        full[name][image, where] = p[name].transpose(1, 2)
        full[name] = full[name].transpose(1, 2)
    size = torch.ones(B, P + patches, dtype=torch.float64).scatter(1, where, p["size"])
    there = torch.zeros(B, P + patches, dtype=torch.bool).scatter(1, where, True)
    mask = (there[:, :, None] & there[:, None])[:, None]  # (B, 1, N0, N0)
    whole = {key: value for key, value in p.items() if key != "place"} | full | {"size": size}
    torch.testing.assert_close(attend(p), attend(whole, mask)[image, where])


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(0, 10_000))
def test_sizes_count_in_the_ranking(p, seed):
    p |= {"budgets": (1,), "prefix": 0, "tail": "none", "tile": ()}
    p["q"], p["k"] = torch.randn(2, *p["q"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    B, H, N, d = p["q"].shape
    p["size"] = 8 * torch.rand(B, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    for h, r in enumerate(p["ranks"]):
        score = p["q"][:, h, :, :r] @ p["k"][:, h, :, :r].mT * d**-0.5 + p["size"].log()[:, None]
        best = p["v"][torch.arange(B)[:, None], h, score.argmax(-1)]  # (B, N, d)
        torch.testing.assert_close(attend(p)[..., h * d : (h + 1) * d], best)


@pytest.mark.parametrize("shared", [True, False])
def test_token_lowrank_sizes_count_in_the_attention_and_not_in_the_ranking(shared):
    q, k, v, w_down, w_up, *none = token_inputs()
    g = torch.Generator().manual_seed(5)
    size = 4 * torch.rand(2, 10, dtype=torch.float64, generator=g) + 0.5
    if not shared:  # weights of each image
        w_down, w_up = torch.rand(2, 1, 5, 10, generator=g).double(), torch.randn(2, 2, 5, 10, generator=g).double()
    tail = (3, 1, "none", (3, 3), (1, 1), ())
    out = token_lowrank(q, k, v, w_down, w_up, none, None, size, None, 0.5, (0.4,), tail)
    scores = ((q @ (w_down @ k).mT) * 0.4).softmax(-1) @ w_up
    kept = scores >= scores.sort(-1, descending=True).values[..., 2:3]
    kept[:, :, 0] = True
    logits = ((q @ k.mT) * 0.5 + size.log()[:, None, None]).masked_fill(~kept, -torch.inf)
    torch.testing.assert_close(out, (logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tail", TAILS)
def test_gradients_with_sizes_and_places(tail):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=g, requires_grad=True) for _ in range(3))
    size = (torch.rand(1, 5, dtype=torch.float64, generator=g) + 0.5).requires_grad_()
    place = torch.tensor([[5, 0, 3, 2]])

    def f(q, k, v, size):
        spec = (2, 1, tail, (2, 3), (2, 2), ())
        return head_lowrank(q, k, v, None, None, None, size, place, [2, 1], 0.5, spec)

    assert torch.autograd.gradcheck(f, (q, k, v, size), atol=1e-6)

    w_down, w_up = torch.rand(1, 1, 3, 5, generator=g).double(), torch.rand(1, 2, 3, 5, generator=g).double()

    def t(q, k, v, size):
        arguments = ([None] * 4, None, size, place, 0.5, (0.5, 2), (2, 1, tail, (2, 3), (2, 2), ()))
        return token_lowrank(q, k, v, w_down, w_up, *arguments)

    assert torch.autograd.gradcheck(t, (q, k, v, size), atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_calls_with_sizes_and_places_in_chunks_on_meta_and_compiled(tail, monkeypatch):
    g = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 2, 10, 8, generator=g)
    size = torch.rand(2, 10, generator=g) + 0.5
    place = torch.stack([torch.randperm(16, generator=g)[:9] for _ in range(2)])

    def f(q, k, v, size, place):
        spec = (3, 1, tail, (4, 4), (2, 2), (2, 2))
        return head_lowrank(q, k, v, None, None, None, size, place, [4, 2], 0.3, spec)

    whole = f(q, k, v, size, place)
    torch.testing.assert_close(torch.compile(f, backend="eager", fullgraph=True)(q, k, v, size, place), whole)
    assert f(*(t.to("meta") for t in (q, k, v, size, place))).shape == whole.shape
    half = f(q.bfloat16(), k.bfloat16(), v.bfloat16(), size, place)
    widened = f(q.bfloat16().float(), k.bfloat16().float(), v.bfloat16().float(), size, place)
    assert half.dtype == torch.bfloat16 and torch.equal(half, widened.bfloat16())
    monkeypatch.setattr(reference, "CHUNK", 100)
    torch.testing.assert_close(f(q, k, v, size, place), whole)


@settings(max_examples=30, deadline=None)
@given(reduced_problems(), st.sampled_from([None, torch.bool, torch.float64]))
def test_dense_attention_with_sizes_counts_keys(p, kind):
    B, H, N, d = p["q"].shape
    count = p["size"].long()[0]
    copies = torch.arange(N).repeat_interleave(count)
    mask = None if kind is None else (torch.arange(N * N).view(N, N) % 3 != 1) | torch.eye(N, dtype=torch.bool)
    if kind == torch.float64:
        mask = torch.where(mask, torch.linspace(-1, 1, N * N).view(N, N).double(), -torch.inf)
    rows = slice(0, max(1, N // 2))  # fewer queries than keys, as the prefix rows alone
    k, v, size = p["k"][:, :, copies], p["v"][:, :, copies], count.double().expand(B, N)
    each = attention.dense("sdpa", p["q"][:, :, rows], k, v, None if mask is None else mask[rows, copies], 0.3, "input")
    one = attention.dense(
        "sdpa", p["q"][:, :, rows], p["k"], p["v"], None if mask is None else mask[rows], 0.3, "input", size
    )
    torch.testing.assert_close(one, each)


def test_similar_keys_share_a_cluster():
    f = torch.tensor([0.0, 10.0, 0.1, 10.1, 0.2, 9.9, 0.0, 10.0, 0.1]).view(1, 1, 9, 1)
    a = tails.TAILS["clusters"].assign(f, None, 0, (3, 3), (1, 2))[0, 0]
    assert len(set(a[[0, 2, 4, 6, 8]].tolist())) == 1 and len(set(a[[1, 3, 5, 7]].tolist())) == 1
    assert a[0] != a[1]


@given(st.floats(1e-6, 1.0), st.integers(1, 5000))
def test_budget_is_the_ceiling_of_keep_n(keep, n):
    b = budget(keep, n)
    assert 1 <= b <= n and b >= keep * n - 1e-6 and (b == 1 or b - 1 < keep * n)


def test_budget_of_a_product_that_is_whole_up_to_rounding():
    assert budget(0.1, 197) == 20 and budget(0.25, 197) == 50 and budget(0.3, 10) == 3 and budget(1.0, 197) == 197


@pytest.mark.parametrize("change", [
    dict(cells=((-1, 1),)), dict(cells=3 * ((2, 2),)), dict(tile=(2,)), dict(prefix=-1), dict(budgets=(0,)),
    dict(budgets=(3, 11)), dict(budgets=(3, 3, 3)), dict(ranks=[10**9, 1]),
    dict(ranks=[5, 1]), dict(ranks=[1]), dict(grid=(0, 9)), dict(tail="unknown"),
])  # fmt: skip
@pytest.mark.parametrize("by", ["op", "attention"])
@pytest.mark.parametrize("backend", ["cpu", "masked", "reference"])
def test_constants_that_cannot_be_are_refused(change, by, backend):
    """The kernels read them without a look: negative cells ended the process."""
    q, k, v = torch.randn(3, 1, 2, 10, 4, generator=torch.Generator().manual_seed(0))
    right = dict(budgets=(3,), prefix=1, tail="clusters", grid=(3, 3), cells=((2, 2),), tile=(), ranks=[2, 1]) | change
    spec = Spec(*(right[name] for name in ("budgets", "prefix", "tail", "grid", "cells", "tile")))
    call = {"op": op, "attention": attention.attention}[by]
    with pytest.raises(ValueError, match=f"sparse_attention: .*{next(iter(change))}"):
        head_lowrank(q, k, v, None, None, None, None, None, right["ranks"], 0.5, spec, backend, call=call)
