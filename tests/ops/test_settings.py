"""Rows at many settings in one pass are those of the reference at each of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.op_calls import head_ranking
from sparsify.ops import reference
from sparsify.ops.selection import Context
from sparsify.ops.settings import Rows
from sparsify.ops.spec import Spec
from sparsify.ops.tails import TAILS


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_setting_is_the_references(data):
    B, H, d, P = (data.draw(st.integers(low, high)) for low, high in ((1, 2), (1, 3), (2, 8), (0, 2)))
    grid = data.draw(st.tuples(st.integers(1, 5), st.integers(2, 5)))
    N = P + grid[0] * grid[1]
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    q, k, v = torch.randn(3, B, H, N, d, generator=g, dtype=torch.float64)
    bias = torch.randn(1, H, N, N, generator=g, dtype=torch.float64) if data.draw(st.booleans()) else None
    tail, tile = data.draw(st.sampled_from([*TAILS])), data.draw(st.sampled_from([(), (2, 2)]))
    budgets = sorted(data.draw(st.sets(st.integers(1, N), min_size=1, max_size=4)))
    cells = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3))
    rows = torch.randperm(N - P, generator=g)[: data.draw(st.integers(1, N - P))] + P
    spec, scale = Spec.uniform(1, P, tail, grid, (1, 1), tile, d**-0.5), d**-0.5
    ranking = head_ranking(q, k, None, None, None, [data.draw(st.integers(1, d)) for _ in range(H)], scale)
    asked = Rows(q, k, v, bias, rows, spec)
    found = list(asked.outputs(ranking.written(q, k), budgets, cells))
    assert len(found) == len(cells)
    for grid_of_cells, out in zip(cells, found, strict=True):
        assert out.shape == (B, H, len(rows), len(budgets), d)
        for i, b in enumerate(budgets):
            one = spec._replace(budgets=(b,), cells=(grid_of_cells,))
            whole = reference.attend(q, k, v, ranking, Context(bias), one).unflatten(-1, (H, d)).transpose(1, 2)
            torch.testing.assert_close(out[..., i, :], whole[:, :, rows])
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(asked.dense, dense[:, :, rows])


@pytest.mark.parametrize("budget", [1, 7, 17])
def test_all_keys_kept_is_dense(budget):
    q, k, v = torch.randn(3, 1, 2, 17, 4, generator=torch.Generator().manual_seed(0))
    spec = Spec.uniform(1, 1, "clusters", (4, 4), (1, 1), scale=0.5)
    asked = Rows(q, k, v, None, torch.arange(1, 17), spec)
    (out,) = asked.outputs(head_ranking(q, k, None, None, None, [4, 2], 0.5).written(q, k), [budget], [(2, 2)])
    same = torch.allclose(out[..., 0, :], asked.dense, atol=1e-5)
    assert same == (budget == 17)


def test_nothing_is_made_on_another_device():
    q, k, v = torch.empty(3, 2, 3, 17, 8, device="meta")
    spec = Spec.uniform(1, 1, "clusters", (4, 4), (1, 1), scale=0.3)
    asked = Rows(q, k, v, torch.empty(1, 3, 17, 17, device="meta"), torch.arange(1, 9, device="meta"), spec)
    found = asked.outputs(head_ranking(q, k, None, None, None, [4, 2, 8], 0.3).written(q, k), [2, 5], [(2, 2), (1, 1)])
    assert [(out.device.type, *out.shape) for out in found] == [("meta", 2, 3, 8, 2, 8)] * 2
