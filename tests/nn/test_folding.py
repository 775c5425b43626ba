"""Trainable head-lowrank predictors: unfolded from `qkv` and folded into it again."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.families import build, images
from sparsify.config import SparsityConfig
from sparsify.nn import attention, graft, projection
from sparsify.nn.folding import fold, retract, unfold
from sparsify.nn.predictor import HeadLowrankPredictor

RANKS = ((8, 3, 21), (1, 64, 5))  # of each head of two blocks


def rotations(generator, heads, d):
    """A basis for each head, well conditioned, and the one that undoes it."""
    t_q = torch.linalg.qr(torch.randn(heads, d, d, generator=generator, dtype=torch.float64)).Q
    t_q = t_q * (0.5 + torch.rand(heads, 1, d, generator=generator, dtype=torch.float64))
    return t_q, torch.linalg.inv(t_q).mT


def sparse(family="deit", **more):
    """A sparse model whose predictors have a random basis."""
    model = build(family)
    graft.graft(model, SparsityConfig(**{"keep": 0.4, "rank": RANKS, "spread": "none", **more}))
    generator = torch.Generator().manual_seed(3)
    for module in attention.sparse_modules(model).values():
        graft.set_basis(module, module.predictor, *rotations(generator, module.num_heads, module.head_dim))
    return model


def perturb(model, seed=5, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in attention.sparse_modules(model).values():
            for a in (module.predictor.a_q, module.predictor.a_k):
                a += size * torch.randn(a.shape, generator=generator)


def outputs(model):
    with torch.inference_mode():
        return model(images(model))


def same(a, b):
    return float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


def test_unfolded_it_computes_the_same_and_folds_back():
    model = sparse()
    before, weights = outputs(model), copy.deepcopy(model.state_dict())
    unfold(model)
    predictors = [m.predictor for m in attention.sparse_modules(model).values()]
    assert [p.folded for p in predictors] == [False, False] and [p.ranks for p in predictors] == list(RANKS)
    assert [tuple(p.a_q.shape) for p in predictors] == [(3, 64, 21), (3, 64, 64)]
    assert all(p.a_q.requires_grad and p.a_k.requires_grad for p in predictors)
    assert same(outputs(model), before)
    assert fold(model)
    assert all(m.predictor.folded and m.predictor.ranks == r for m, r in zip(sparse_of(model), RANKS, strict=True))
    assert same(outputs(model), before) and model.state_dict().keys() == weights.keys()


def sparse_of(model):
    return list(attention.sparse_modules(model).values())


def test_what_was_learned_is_folded_exactly():
    model = sparse()
    unfold(model)
    before = outputs(model)
    perturb(model)
    retract(model)
    for module in sparse_of(model):
        for h, r in enumerate(module.predictor.ranks):
            a_q, a_k = module.predictor.a_q[h].detach(), module.predictor.a_k[h].detach()
            assert float((a_k[:, :r].mT @ a_q[:, :r] - torch.eye(r)).abs().max()) < 1e-5
            assert not a_q[:, r:].any() and not a_k[:, r:].any()
    learned = outputs(model)
    assert not same(learned, before)  # other keys are chosen now
    assert fold(model) and same(outputs(model), learned)
    assert not any("predictor" in name for name, _ in model.named_parameters())


def test_what_is_no_basis_is_left_as_it_is():
    model = sparse()
    unfold(model)
    perturb(model)
    weights, learned = copy.deepcopy(model.state_dict()), outputs(model)
    assert not fold(model)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert torch.equal(outputs(model), learned) and not any(m.predictor.folded for m in sparse_of(model))


def test_one_block_that_cannot_be_folded_keeps_all_unfolded():
    model = sparse()
    unfold(model)
    with torch.no_grad():
        sparse_of(model)[1].predictor.a_q[0, 0, 0] += 0.5
    weights = copy.deepcopy(model.state_dict())
    assert not fold(model)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        sparse_of(model)[1].predictor.a_q[0, 0, 0] = float("nan")
    assert not fold(model)


def test_norms_of_queries_and_keys_stand_between():
    model = sparse("qk-norm")
    weights = copy.deepcopy(model.state_dict())
    unfold(model)
    retract(model)  # they will not be folded: nothing to keep
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert not fold(model)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def test_dense_blocks_and_other_predictors_are_passed_by():
    model = sparse(keep=(0.4, "dense"))
    unfold(model)
    assert len(sparse_of(model)) == 1 and fold(model)
    other = build("deit")
    graft.graft(other, SparsityConfig(predictor="token-lowrank", rank=4, tail="none"))
    before = copy.deepcopy(other.state_dict())
    unfold(other)
    retract(other)
    assert fold(other) and all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.data())
def test_retracted_pairs_are_dual(d, data):
    ranks = tuple(data.draw(st.lists(st.integers(1, d), min_size=1, max_size=3)))
    seed, size = data.draw(st.integers(0, 2**20)), data.draw(st.floats(0, 0.3))
    model = torch.nn.Module()
    model.attn = stub(d, ranks)
    generator = torch.Generator().manual_seed(seed)
    predictor = model.attn.predictor
    with torch.no_grad():
        for a in (predictor.a_q, predictor.a_k):
            noise = torch.randn(a.shape, generator=generator)
            a += size * noise / max(1.0, float(torch.linalg.matrix_norm(noise, 2).max()))
    a_q = predictor.a_q.detach().clone()
    retract(model)
    for h, r in enumerate(ranks):
        product = predictor.a_k[h, :, :r].mT @ predictor.a_q[h, :, :r]
        assert float((product - torch.eye(r)).detach().abs().max()) < 1e-5
        assert torch.equal(predictor.a_q[h, :, :r], a_q[h, :, :r])  # A_k alone moves
    a_k = predictor.a_k.detach().clone()
    retract(model)
    assert torch.allclose(predictor.a_k, a_k, atol=1e-5)  # a second time changes nothing


def stub(d, ranks):
    """The attention of one block, with heads of size d and an unfolded predictor."""
    host = build("deit", depth=1, embed_dim=d * len(ranks), num_heads=len(ranks))
    graft.graft(host, SparsityConfig(rank=(ranks,), fold=False, spread="none"))
    (module,) = attention.sparse_modules(host).values()
    assert isinstance(module.predictor, HeadLowrankPredictor)
    return module


def test_folding_balances_queries_and_keys_and_every_product_stays_equal_to_the_bit(monkeypatch):
    """An 8-bit format with one scale for all of `qkv` needs rows of one size; powers of two change no product."""
    balanced = sparse()
    monkeypatch.setattr(projection, "_scales", lambda q, k, ranks: torch.ones_like(q))
    plain = sparse()
    assert torch.equal(outputs(balanced), outputs(plain))
    for module, other, ranks in zip(sparse_of(balanced), sparse_of(plain), RANKS, strict=True):
        rows, before = (m.qkv.weight.detach().view(3, 3, 64, -1) for m in (module, other))
        scale = rows[0].norm(dim=-1) / before[0].norm(dim=-1)  # (heads, d)
        torch.testing.assert_close(scale, scale.log2().round().exp2())  # powers of two
        for h, r in enumerate(ranks):
            assert len(set(scale[h, :r].log2().round().tolist())) == 1  # distances between keys keep their order
            q, k = (rows[i, h, r:].norm(dim=-1) for i in (0, 1))
            assert bool(((q / k).log2().abs() <= 1.001).all())
        assert torch.equal(rows[2], before[2])


def test_a_coordinate_without_weights_is_not_scaled():
    q, k = torch.tensor([[1.0, 0.0, 4.0]]), torch.tensor([[16.0, 2.0, 0.0]])
    assert projection._scales(q, k, [1]).tolist() == [[4.0, 1.0, 1.0]]
