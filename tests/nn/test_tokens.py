"""Token stages, against loops written from the docstrings of `sparsify.nn.tokens`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention

from helpers.merging_by_hand import merged_by_hand, ranked_by_hand
from sparsify.config import SparsityConfig
from sparsify.config import Tokens as Rates
from sparsify.nn import merging, tokens_compared
from sparsify.nn.attention import DenseAttention
from sparsify.nn.importance import attention_importance as importance
from sparsify.nn.merging import ROUND, effective_size, matching, rounds, weighted_mean
from sparsify.nn.predictor import TokenLowrankPredictor
from sparsify.nn.tokens import WAYS, TokenStage, TokenState, ranking


def random(*shape, seed=0, positive=False):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=g) + 1e-3 if positive else torch.randn(*shape, generator=g)


def tracked(x, prefix, sizes=False):
    """The full state of tokens x [B, P + n, C] before any stage."""
    patches = x.shape[1] - prefix
    owner = torch.arange(patches).expand(len(x), -1)
    return TokenState(
        patches, random(*x.shape[:2], seed=9, positive=True) if sizes else None, None, owner, x[:, prefix:]
    )


STAGES = dict(
    B=st.integers(1, 3), n=st.integers(1, 13), prefix=st.integers(0, 2), seed=st.integers(0, 10_000), data=st.data()
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60, deadline=None)
@given(**STAGES)
def test_two_stages_by_hand(way, B, n, prefix, seed, data):
    """Who goes on, features, sizes, places, owners and last features, over two stages."""
    x, C = random(B, prefix + n, 6, seed=seed), 6
    tokens = tracked(x, prefix, sizes=way == "merge" and data.draw(st.booleans()))
    members = [[[j] for j in range(n)] for _ in range(B)]  # of each token, in patches
    for _ in range(2):
        present = x.shape[1] - prefix
        share = data.draw(st.integers(1, n)) / n
        m = min(present, math.ceil(share * n - 1e-9))
        I = random(B, present, seed=seed + present, positive=True)
        stage = TokenStage(way, share, prefix)
        y, after = stage(x, I, tokens)
        fuse = way == "evit-fused" and m < present
        assert y.shape == (B, prefix + m + fuse, C) and after.patches == n and torch.equal(y[:, :prefix], x[:, :prefix])
        for b in range(B):
            patch = x[b, prefix:]
            own = torch.ones(present) if tokens.size is None else tokens.size[b, prefix:]
            place = torch.arange(n) if tokens.place is None else tokens.place[b]
            keep, into = (
                merged_by_hand(patch, I[b], m) if way == "merge" else ranked_by_hand(I[b], m, fuse)
            )  # fmt: skip
            assert after.place[b].tolist() == place[keep].tolist()
            spread = after.spread(y[:, prefix:])[b]  # (n0, C)
            for new, old in enumerate(keep):
                group = [j for j in range(present) if into[j] == old]
                w = I[b, group] / I[b, group].sum()
                torch.testing.assert_close(y[b, prefix + new], (w[:, None] * patch[group]).sum(0))
                if way == "merge":
                    size = (I[b, group].sum().log() - (w * (I[b, group] / own[group]).log()).sum()).exp()
                    torch.testing.assert_close(after.size[b, prefix + new], size)
                for j in (p for g in group for p in members[b][g]):
                    assert after.owner[b, j] == new and torch.equal(spread[j], y[b, prefix + new])
            for j in (p for g, to in enumerate(into) if to is None for p in members[b][g]):
                assert after.owner[b, j] == -1 and torch.equal(spread[j], tokens.spread(x[:, prefix:])[b, j])
            members[b] = [[p for g, to in enumerate(into) if to == old for p in members[b][g]] for old in keep]
        assert way == "merge" or after.size is None
        gone = tokens.owner < 0  # those that had been dropped before stay what they were
        assert torch.equal(after.spread(y[:, prefix:])[gone], tokens.spread(x[:, prefix:])[gone])
        x, tokens = y, after


def test_counts_follow_the_rates_exactly():
    def counts(n, **rates):
        present, found = n, []
        for share in Rates(**rates).shares(12):
            if share is not None:
                present = TokenStage("merge", share, 1).count(present, n)
                found.append(present)
        return found

    assert counts(196, keep=0.7) == [138, 97, 68] and counts(196, keep=0.5) == [98, 49, 25]
    assert counts(196, keep=1.0) == [196] * 3 and counts(576, keep=0.7) == [404, 283, 198]
    assert counts(196, keep=(1, 0.5, *[1] * 8, 0.1, 0.0)) == [98, 10, 0]
    assert counts(100, keep=0.07, stages=(5,)) == [7]  # a product that is whole up to rounding
    assert counts(1, keep=0.01) == [1, 1, 1] and counts(3, keep=0.7) == [3, 2, 2]
    assert Rates(keep=0.7).shares(12)[3::3] == (0.7, 0.7**2, 0.7**3)
    assert Rates(keep=0.5, stages=(10, 2)).shares(10) == (None, 0.5, *[None] * 7, 0.25)


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(1, (1,)), (2, (1, 2)), (4, (2, 3, 4)), (6, (2, 4, 5)), (12, (4, 7, 10)), (24, (7, 13, 19)), (40, (11, 21, 31))],
)
def test_stages_that_are_not_given_stand_by_the_depth(depth, blocks):
    rates = Rates(keep=0.5)
    rates.check(depth, 1)
    assert rates.with_stages(depth).stages == blocks
    assert [i for i, share in enumerate(rates.shares(depth), 1) if share is not None] == list(blocks)
    assert rates.shares(depth) == Rates(keep=0.5, stages=blocks).shares(depth)
    given_ = Rates(keep=0.5, stages=(1,))
    assert given_.with_stages(depth) is given_


@given(st.integers(1, 2000), st.floats(1e-3, 1), st.floats(1e-3, 1))
def test_count_is_the_ceiling_and_never_grows(n, share, less):
    stage = TokenStage("merge", share, 1)
    m = stage.count(n, n)
    assert 1 <= m <= n and m >= share * n - 1e-6 and (m == 1 or m - 1 < share * n)
    assert TokenStage("merge", share * less, 1).count(m, n) <= m


def test_equally_important_tokens_go_by_the_lower_index():
    I = torch.tensor([[1.0, 2, 1, 2, 1, 1]])
    assert ranking(I, 3, False)[0].tolist() == [[0, 1, 3]] and ranking(torch.ones(1, 6), 2, False)[0].tolist() == [
        [0, 1]
    ]
    keep, group = ranking(I, 3, True)
    assert keep.tolist() == [[0, 1, 2, 3]] and group.tolist() == [[0, 1, 2, 3, 2, 2]]
    keep, group = ranking(I, 3, False)
    assert group.tolist() == [[0, 1, -1, 2, -1, -1]]
    same = torch.zeros(1, 7, 4)
    same[..., 0] = 1  # every cosine is exactly 1
    keep, group = matching(same, torch.ones(1, 7), 5)  # the lower index goes first, into the next that is as near
    assert keep.tolist() == [[2, 3, 4, 5, 6]] and group.tolist() == [[0, 0, 0, 1, 2, 3, 4]]
    keep, group = matching(same, torch.ones(1, 7), 3)  # one goes into the next, and with it where that one goes
    assert keep.tolist() == [[4, 5, 6]] and group.tolist() == [[0, 0, 0, 0, 0, 1, 2]]
    apart = torch.eye(6)[None]  # every cosine is 0: cost is the importance
    assert matching(apart, torch.tensor([[3.0, 1, 2, 1, 2, 1]]), 4)[0].tolist() == [[0, 2, 4, 5]]


def same(one, other):
    """Equal to the bit, or both nothing."""
    return one is other if one is None or other is None else torch.equal(one, other)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 20), seed=st.integers(0, 10_000), data=st.data())
def test_images_of_a_batch_do_not_meet(way, n, seed, data):
    x, I = random(4, 2 + n, 8, seed=seed), random(4, n, seed=seed, positive=True)
    tokens = tracked(x, 2, sizes=True)
    stage = TokenStage(way, data.draw(st.integers(1, n)) / n, 2)
    y, after = stage(x, I, tokens)
    order = torch.tensor(data.draw(st.permutations(range(4))))[: data.draw(st.integers(1, 4))]
    some = TokenState(n, *(None if t is None else t[order] for t in tokens[1:]))
    z, then = stage(x[order], I[order], some)
    torch.testing.assert_close(z, y[order])
    for one, other in zip(then[1:], after[1:], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other[order])
    again, twice = stage(x, I, tokens)
    assert torch.equal(again, y) and all(same(a, b) for a, b in zip(twice[1:], after[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_all_stay_as_they_are_to_the_bit(way, n, dtype):
    """Of low importance too, which half precision has not."""
    x, I = random(2, 1 + n, 5).to(dtype), random(2, n, positive=True) * 1e-12
    tokens = tracked(x, 1, sizes=way == "merge")
    y, after = TokenStage(way, 1.0, 1)(x, I, tokens)
    assert y.dtype == dtype and torch.equal(y, x)
    assert after.place.tolist() == [list(range(n))] * 2 and torch.equal(after.owner, tokens.owner)
    if way == "merge":
        torch.testing.assert_close(after.size, tokens.size)


@pytest.mark.parametrize("way", WAYS)
def test_few_tokens(way):
    for n in (2, 3):
        for m in range(1, n + 1):
            x, I = random(1, n, 4), random(1, n, positive=True)
            y, after = TokenStage(way, m / n, 0)(x, I, tracked(x, 0))
            assert y.shape[1] == m + (way == "evit-fused" and m < n)
            assert after.spread(y).shape == (1, n, 4) and y.isfinite().all()
    x = random(1, 1, 4)
    assert torch.equal(TokenStage(way, 0.1, 0)(x, torch.ones(1, 1), tracked(x, 0))[0], x)


def test_one_token_left_of_all_is_their_weighted_mean():
    x, I = random(2, 6, 4), random(2, 6, positive=True)
    y, after = TokenStage("merge", 0.1, 0)(x, I, tracked(x, 0))
    torch.testing.assert_close(y[:, 0], (I.unsqueeze(-1) * x).sum(1) / I.sum(1, keepdim=True))
    assert not after.owner.any() and torch.equal(after.spread(y), y.expand(2, 6, 4))
    assert after.place.flatten().tolist() == [merged_by_hand(x[b], I[b], 1)[0][0] for b in range(2)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10_000))
def test_effective_size_lies_between_its_bounds(n, seed):
    """At most the count of tokens, which equal tokens reach; towards the size of one that has all the importance."""
    size, I = 4 * random(1, n, seed=seed, positive=True), random(1, n, seed=seed + 1, positive=True)
    group = torch.zeros(1, n, dtype=torch.int64)
    s = float(effective_size(size, I, group, 1))
    assert float(size.min()) * 0.9999 <= s <= float(size.sum()) * 1.0001
    torch.testing.assert_close(effective_size(size, size * 0.01, group, 1), size.sum(1, keepdim=True))
    torch.testing.assert_close(
        effective_size(torch.ones(1, n), torch.full((1, n), 0.3), group, 1), torch.tensor([[n * 1.0]])
    )
    alone = torch.full((1, n), 1e-12)
    alone[0, n // 2] = 1
    torch.testing.assert_close(effective_size(size, alone, group, 1), size[:, n // 2, None], atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10_000), st.booleans(), st.data())
def test_merged_tokens_are_given_their_attention_again(n, seed, sized, data):
    """The promise of the effective size: by the row that gave the importance, over linear keys; its output too."""
    keys, q = random(1, 1, 1 + n, 4, seed=seed).double(), random(1, 1, 1, 4, seed=seed + 1).double()
    size = random(1, 1 + n, seed=seed + 2, positive=True).double() if sized else None
    logs = 0 if size is None else size.log()[:, None, None]
    attention = (0.7 * q @ keys.mT + logs).softmax(-1)[0, 0, 0]  # (1 + n)
    asked = torch.cat([q, torch.zeros(1, 1, n, 4).double()], 2)
    I = importance(asked, keys, 0.7, size, 1, 1).double()
    torch.testing.assert_close(I[0], attention[1:], atol=1e-6, rtol=1e-5)
    m = data.draw(st.integers(1, n))
    y, after = TokenStage("merge", m / n, 1)(keys[0], I, TokenState(n, size, None, torch.arange(n)[None]))
    again = (0.7 * q[0] @ y.mT + after.size.log()).softmax(-1)[0, 0]  # (1 + m)
    given = torch.zeros(m, dtype=torch.float64).scatter_add(0, after.owner[0], attention[1:])
    torch.testing.assert_close(again, torch.cat([attention[:1], given]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(again @ y[0], attention @ keys[0, 0], atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10_000), st.sampled_from([1, 3, 8]), st.data())
def test_looking_in_parts_finds_the_same(n, seed, together, data):
    x, I = random(2, n, 5, seed=seed), random(2, n, seed=seed + 1, positive=True)
    m = data.draw(st.integers(1, n - 1))
    whole = matching(x, I, m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "TOGETHER", together)
        assert all(torch.equal(a, b) for a, b in zip(matching(x, I, m), whole, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10_000), st.booleans(), st.data())
def test_comparisons_choose_and_merge_the_same(n, seed, ties, data):
    x, I = random(2, n, 5, seed=seed), random(2, n, seed=seed + 1, positive=True)
    if ties:  # equal tokens, whose cosines are exact, of equal importance
        x, I = torch.nn.functional.one_hot(torch.arange(n) // 3 % 5, 5).float().expand(2, n, 5), (3 * I).round() + 1
    m = data.draw(st.integers(1, n - 1))
    keep, group = matching(x, I, m)
    found = tokens_compared.matching(x, I, m)
    assert torch.equal(found[0], keep) and torch.equal(found[1], group)
    for fuse in (False, True):
        expected, found = ranking(I, m, fuse), tokens_compared.ranking(I, m, fuse)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("sized", [False, True])
def test_importance_is_the_attention_of_the_leading_rows(rows, sized):
    q, k = random(2, 3, 7, 4, seed=1), random(2, 3, 7, 4, seed=2)
    size = random(2, 7, positive=True) if sized else None
    expected = torch.zeros(2, 5)
    for b in range(2):
        for h in range(3):
            asking = [q[b, h, i] for i in range(rows)] or [q[b, h].mean(0)]
            for row in asking:
                e = torch.tensor([math.exp(0.5 * float(row @ key)) for key in k[b, h]])
                e = e if size is None else e * size[b]
                expected[b] += (e / e.sum())[2:] / len(asking) / 3
    torch.testing.assert_close(importance(q, k, 0.5, size, rows, 2), expected)


def test_importance_is_above_zero_and_has_no_gradient():
    q = torch.full((1, 1, 4, 1), 100.0, requires_grad=True)
    k = torch.tensor([0.0, 50, -50, 0]).view(1, 1, 4, 1)
    I = importance(q, k, 1.0, None, 1, 1)
    assert not I.requires_grad and (I > 0).all() and I[0, 0] == 1
    y, tokens = TokenStage("merge", 0.3, 1)(random(1, 4, 5), I, tracked(random(1, 4, 5), 1))
    assert y.isfinite().all() and tokens.size.isfinite().all() and (tokens.size > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast_choose_as_float32_does(dtype):
    q, k, x = (random(2, 3, 41, 8, seed=s).to(dtype) for s in (1, 2, 3))
    x = x[:, 0] + 10  # cosines that bfloat16 does not tell apart
    I = importance(q, k, 0.5, None, 1, 1)
    expected = matching(x[:, 1:].float(), I, 25)
    with torch.autocast("cpu", torch.bfloat16):
        same = importance(q, k, 0.5, None, 1, 1)
        found = matching(x[:, 1:], same, 25)
        y, tokens = TokenStage("merge", 5 / 8, 1)(x, same, tracked(x, 1))
    assert I.dtype == same.dtype == tokens.size.dtype == torch.float32 and torch.equal(I, same) and y.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("before", [False, True])
def test_drop_all_leaves_the_prefix(way, before):
    x = random(2, 8, 4)
    tokens = tracked(x, 2, sizes=way == "merge")
    if before:
        x, tokens = TokenStage(way, 0.5, 2)(x, random(2, 6, positive=True), tokens)
    last = tokens.spread(x[:, 2:])
    y, after = TokenStage(way, 0.0, 2)(x, torch.ones(2, x.shape[1] - 2), tokens)
    assert torch.equal(y, x[:, :2]) and after.place.shape == (2, 0) and (after.owner == -1).all()
    assert torch.equal(after.spread(y[:, 2:]), last)
    assert after.size is None if tokens.size is None else torch.equal(after.size, tokens.size[:, :2])
    z, twice = TokenStage(way, 0.0, 2)(y + 1, torch.ones(2, 0), after)
    assert torch.equal(z, y + 1) and torch.equal(twice.spread(z[:, 2:]), last)


def test_owners_and_features_are_tracked_on_request_only():
    x = random(2, 7, 4)
    for way in WAYS:
        y, tokens = TokenStage(way, 0.5, 1)(x, random(2, 6, positive=True), TokenState(6))
        assert tokens.owner is None and tokens.seen is None and tokens.spread(y) is y
        assert (tokens.size is not None) == (way == "merge")
        owner = torch.arange(6).expand(2, -1)
        tokens = TokenStage(way, 0.5, 1)(x, random(2, 6, positive=True), TokenState(6, owner=owner))[1]
        assert tokens.owner.shape == (2, 6) and tokens.seen is None


@pytest.mark.parametrize("count,lefts", [(2, (5,)), (2, (8, 5)), (4, (15, 12)), (3, (11, 9))])
def test_merging_equal_tokens_loses_nothing(count, lefts, monkeypatch):
    """Attention of the merged tokens is that of all of them, over one stage or two, and sizes are whole counts."""
    monkeypatch.setattr(merging, "CANDIDATES", 20)  # all are candidates, so that every token finds its copy
    torch.manual_seed(0)
    attention = DenseAttention(Attention(16, 2, qkv_bias=True).eval())
    attention.qkv.weight.data *= 4
    x = random(2, 6, 16, seed=3)
    x = torch.cat([x[:, :1], x[:, 1:].repeat_interleave(count, 1)], 1)  # a prefix token, then copies beside each other
    with torch.no_grad():
        full = attention(x)
        y, tokens = x, TokenState(5 * count, owner=torch.arange(5 * count).expand(2, -1))
        for left in lefts:
            q, k, _ = attention.qkv_heads(y)
            I = importance(q, k, attention.scale, tokens.size, 1, 1)
            y, tokens = TokenStage("merge", left / (5 * count), 1)(y, I, tokens)
        members = torch.nn.functional.one_hot(tokens.owner, lefts[-1]).sum(1).float()  # (B, m)
        torch.testing.assert_close(tokens.size, torch.cat([torch.ones(2, 1), members], 1), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(tokens.spread(y[:, 1:]), x[:, 1:], atol=1e-5, rtol=1e-5)
        merged = attention.close(attention.attend(*attention.qkv_heads(y), None, tokens), y)
        whole = torch.cat([merged[:, :1], tokens.spread(merged[:, 1:])], 1)
        torch.testing.assert_close(whole, full, atol=1e-4, rtol=1e-4)
        rows = attention.prefix_rows(y, 1, tokens)
        torch.testing.assert_close(rows, full[:, :1], atol=1e-4, rtol=1e-4)


@given(st.integers(1, 1000), st.data())
def test_rounds_are_short_and_end_where_they_should(n, data):
    m = data.draw(st.integers(1, n))
    lefts = rounds(n, m)
    before = [n, *lefts[:-1]]
    assert lefts[-1] == m
    for b, a in zip(before, lefts, strict=True):
        assert a > ROUND * b - 1 and (a < b or n == m)
    assert len(lefts) == 1 or m < ROUND * n + 1


def test_least_important_tokens_find_the_nearest_of_all_that_matter_more():
    """All tokens are compared: a twin is found at any position, and no token is merged into a less important one."""
    x = torch.eye(8)[[0, 1, 2, 3, 0, 1, 6, 7]].unsqueeze(0)  # 4 is the twin of 0, 5 of 1
    I = torch.tensor([[1.0, 2, 9, 9, 9, 9, 9, 9]])
    keep, group = matching(x, I, 6)
    assert keep.tolist() == [[2, 3, 4, 5, 6, 7]] and group[0, :2].tolist() == [2, 3]
    keep, group = matching(x, torch.tensor([[9.0, 9.5, 3, 4, 1, 2, 8, 8.5]]), 6)
    assert keep.tolist() == [[0, 1, 2, 3, 6, 7]] and group[0, 4:6].tolist() == [0, 1]


def token_lowrank(tokens, prefix, shared=False):
    knobs = SparsityConfig(predictor="token-lowrank").token_lowrank.model_dump() | {"shared_projection": shared}
    predictor = TokenLowrankPredictor(2, 4, tokens, prefix, 3, knobs)
    with torch.no_grad():
        for i, parameter in enumerate(predictor.parameters()):
            parameter.copy_(random(*parameter.shape, seed=20 + i))
    return predictor


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_columns_of_a_token_lowrank_predictor_follow_the_tokens(way, shared):
    predictor, x = token_lowrank(8, 2, shared), random(2, 8, 4)
    tokens = TokenState(6, owner=torch.arange(6).expand(2, -1) if way == "merge" else None)
    assert all(
        torch.equal(a, b) for a, b in zip(predictor.weights_of(8, None), predictor.weights_of(8, tokens), strict=True)
    )
    for share in (0.7, 0.4):
        x, tokens = TokenStage(way, share, 2)(x, random(2, x.shape[1] - 2, positive=True), tokens)
        down, up = predictor.weights_of(x.shape[1], tokens)
        basis = predictor.basis()
        assert down.shape == (2, 1, 3, x.shape[1]) and up.shape == (2, len(basis), 3, x.shape[1])
        for b in range(2):
            assert torch.equal(down[b, 0, :, :2], predictor.w_down[:, :2]) and torch.equal(
                up[b, ..., :2], basis[..., :2]
            )
            for j, place in enumerate(tokens.place[b].tolist()):
                group = [place] if way != "merge" else [p for p in range(6) if tokens.owner[b, p] == j]
                size = 1 if tokens.size is None else tokens.size[b, 2 + j]
                torch.testing.assert_close(down[b, 0, :, 2 + j], predictor.w_down[:, [2 + p for p in group]].sum(1))
                expected = basis[..., [2 + p for p in group]].mean(-1) * size
                torch.testing.assert_close(up[b, ..., 2 + j], expected)
    x, tokens = TokenStage(way, 0.0, 2)(x, torch.ones(2, x.shape[1] - 2), tokens)
    down, up = predictor.weights_of(2, tokens)
    assert torch.equal(down, predictor.w_down[:, :2].expand(2, 1, 3, 2)) and torch.equal(up[0], basis[..., :2])


def test_token_lowrank_refuses_another_number_of_patches():
    with pytest.raises(ValueError, match="made for 8 tokens, not 6"):
        token_lowrank(8, 2).weights_of(6, TokenState(4))
    with pytest.raises(ValueError, match="made for 8 tokens, not 11"):
        token_lowrank(8, 2).weights_of(5, TokenState(9, place=torch.tensor([[0, 4, 8]])))


def test_weighted_mean_reads_what_the_attention_read():
    x, I = random(1, 5, 3), torch.tensor([[0.5, 0.25, 0.0625, 0.125, 0.0625]])
    group = torch.tensor([[0, 1, -1, 0, 1]])
    y = weighted_mean(x, I, group, 2)[0]
    torch.testing.assert_close(y, torch.stack([0.8 * x[0, 0] + 0.2 * x[0, 3], 0.8 * x[0, 1] + 0.2 * x[0, 4]]))


@pytest.mark.parametrize("way", WAYS)
def test_features_have_the_gradient_of_their_means(way):
    x = random(1, 7, 3).double().requires_grad_()
    I = random(1, 6, positive=True).double()
    assert torch.autograd.gradcheck(lambda x: TokenStage(way, 0.5, 1)(x, I, TokenState(6))[0], (x,))
