"""A new predictor and a new tail take one class each and no change elsewhere: they attend, train, are timed and counted."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from helpers.families import build, images
from sparsify.config import SparsityConfig
from sparsify.measure.profile import profile
from sparsify.nn import graft
from sparsify.nn.attention import Execution, sparse_modules
from sparsify.nn.execution import set_execution
from sparsify.nn.predictor import Predictor
from sparsify.ops import backends
from sparsify.ops.auto import Chooser
from sparsify.ops.selection import Ranking
from sparsify.ops.tails import Tail


class Projected(Predictor):
    """Scores (q A).(k A)' with one random projection A [d, 2] for all heads."""

    def __init__(self, head_dim):
        super().__init__()
        self.a = nn.Parameter(torch.randn(head_dim, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, q, k, mask, tokens, spec):
        row, col, H = q @ self.a.to(q.dtype), k @ self.a.to(k.dtype), q.shape[1]  # (B, H, N, 2) each
        self.heads = H
        return Ranking(row, col, None, None, 1 / spec.scale, (2,) * H, self.macs(int(q.shape[2]), spec.prefix))

    def macs(self, N, P):
        return self.heads * (2 * N * self.a.numel() + (N - P) * N * 2)

    def compared(self, heads, head_dim):
        return (2,) * heads


class Columns(Tail):
    """The keys of every patch column share a cell."""

    name = "columns"

    def count(self, grid, cells):
        return grid[1]

    def cell(self, features, weight, grid, cells, place):
        patches = torch.arange(grid[0] * grid[1], device=features.device) if place is None else place[:, None]
        return (patches % grid[1]).expand(*features.shape[:2], -1)


class Lost(Tail):
    """Dropped keys are lost, under another name."""

    name, stands_for_dropped_keys = "lost", False

    def count(self, grid, cells):
        return 0


class OneRow(Projected):
    """The same keys for all images and heads: column factors that broadcast, and none for `clusters` but these."""

    def forward(self, q, k, mask, tokens, spec):
        ranking = super().forward(q, k, mask, tokens, spec)
        return ranking._replace(col=ranking.col[:1, :1])


def grafted(predictor=None, tail=None, keep=0.3):
    """A small model with the new parts in every block."""
    dense = build("deit", depth=2).requires_grad_(False)
    head_dim = dense.blocks[0].attn.head_dim
    predictors = None if predictor is None else [predictor(head_dim).requires_grad_(False) for _ in dense.blocks]
    model = graft.graft(dense, SparsityConfig(keep=keep, rank=4), predictors)
    for module in sparse_modules(model).values():
        if tail is not None:
            module.sparsity = dataclasses.replace(module.sparsity, tail=tail())
    return model.requires_grad_(False).eval()


PARTS = pytest.mark.parametrize(
    "parts", [dict(predictor=Projected), dict(tail=Columns), dict(predictor=Projected, tail=Columns)]
)


def through(model, x, backend):
    set_execution(model, Execution(backend))
    with torch.inference_mode():
        return model(x)


@PARTS
def test_keep_one_equals_dense_and_less_differs(parts):
    model = grafted(**parts, keep=1.0)
    x = images(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), graft.dense_twin(model)(x), atol=1e-4, rtol=1e-4)
    less = grafted(**parts)
    with torch.inference_mode():
        assert (less(x) - model(x)).abs().max() > 1e-3


@PARTS
def test_the_kernels_give_what_the_reference_gives(parts):
    model = grafted(**parts)
    x = images(model)
    torch.testing.assert_close(through(model, x, "auto"), through(model, x, "reference"), atol=1e-4, rtol=1e-3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), through(model, x, "auto"), atol=1e-4, rtol=1e-3)


@PARTS
def test_gradients_reach_the_backbone(parts):
    model = grafted(**parts)
    model.blocks[0].attn.qkv.weight.requires_grad_(True)
    model.train()(images(model)).sum().backward()
    grad = model.blocks[0].attn.qkv.weight.grad
    assert grad is not None and grad.isfinite().all() and grad.any()


@PARTS
def test_auto_times_them_and_profile_counts_them_twice(parts):
    model = grafted(**parts)
    set_execution(model, Execution("auto", "input", True, Chooser()))
    with torch.inference_mode():
        model(images(model))
    figures = profile(model, measure=False)  # refuses to print figures where the two counts differ
    assert figures.predictor_macs > 0 and not figures.unsupported
    if "tail" in parts:
        cells = model.patch_embed.grid_size[1] + 1  # the columns and the cls key
        N, width, depth = 1 + model.patch_embed.num_patches, model.embed_dim, 2
        assert figures.tail_macs == depth * (N - 1) * cells * 2 * width


def test_a_new_tail_may_be_none_and_a_ranking_may_broadcast():
    model, plain = (
        grafted(tail=Lost),
        graft.graft(build("deit", depth=2), SparsityConfig(keep=0.3, rank=4, tail="none")),
    )
    x = images(model)
    torch.testing.assert_close(through(model, x, "auto"), through(plain.requires_grad_(False).eval(), x, "auto"))
    assert profile(model, measure=False).tail_macs == 0
    for tail in (None, Columns):
        model = grafted(OneRow, tail)
        module = next(iter(sparse_modules(model).values()))
        q, k, v = torch.randn(3, 2, 3, 37, 64, generator=torch.Generator().manual_seed(2)).unbind(0)
        mask = torch.ones(37, 37, dtype=torch.bool).tril()
        out = module.attend(q, k, v, mask, None)
        assert out.shape == (2, 37, 192) and out.isfinite().all()


def test_copies_of_a_tail_are_the_tail():
    sparsity = next(iter(sparse_modules(grafted()).values())).sparsity
    assert copy.deepcopy(sparsity) == sparsity and "tail=clusters" in repr(sparsity)


def test_predictors_of_one_class_with_other_parameters_are_timed_apart():
    assert Projected(8).kind() != Projected(16).kind()


def test_a_new_tail_is_written_by_hand():
    """One row by the equation of `tails.py`: kept keys, and every column's mean key times its dropped keys."""
    module = next(iter(sparse_modules(grafted(tail=Columns)).values()))
    h, w = module.sparsity.grid
    q, k, v = torch.randn(3, 1, 3, 1 + h * w, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = module.attend(q, k, v, None, None).view(1 + h * w, 3, 32)
    assert backends.resolve("auto", q) == "reference"
    spec, r = module.spec(1 + h * w), module.predictor.ranks
    for head, row in ((0, 1), (2, h * w)):
        scores = k[0, head, :, : r[head]] @ q[0, head, row, : r[head]]
        kept = set(scores.topk(spec.budgets[0]).indices.tolist())
        logits = k[0, head] @ q[0, head, row] * module.scale
        terms = [(logits[j].exp(), v[0, head, j]) for j in kept]
        for cell in [[0], *([1 + y * w + x for y in range(h)] for x in range(w))]:
            dropped = len(set(cell) - kept)
            mean = (k[0, head, cell].mean(0) @ q[0, head, row] * module.scale).exp()
            terms.append((dropped * mean, v[0, head, cell].mean(0)))
        expected = sum(weight * value for weight, value in terms) / sum(weight for weight, _ in terms)
        torch.testing.assert_close(out[row, head], expected)
