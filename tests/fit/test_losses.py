"""The losses of the fine-tuning, against sums written out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.fit.finetune import losses


@pytest.fixture
def drawn():
    return torch.Generator().manual_seed(0)


def test_classification_is_the_cross_entropy_with_soft_targets(drawn):
    logits, y = torch.randn(4, 3, generator=drawn), torch.rand(4, 3, generator=drawn)
    y = y / y.sum(1, keepdim=True)
    by_hand = 0.0
    for row, target in zip(logits.tolist(), y.tolist(), strict=True):
        total = math.log(sum(map(math.exp, row)))
        by_hand += sum(t * (total - z) for z, t in zip(row, target, strict=True)) / 4
    assert float(losses.classification(logits, y)) == pytest.approx(by_hand, rel=1e-5)
    hard = torch.tensor([0, 2, 1, 1])
    one_hot = torch.nn.functional.one_hot(hard, 3).float()
    expected = torch.nn.functional.cross_entropy(logits, hard)
    assert float(losses.classification(logits, one_hot)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_of_the_student_from_the_teacher_times_the_square_of_the_temperature(drawn, temperature):
    teacher, student = torch.randn(3, 5, generator=drawn), torch.randn(3, 5, generator=drawn)
    by_hand = 0.0
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        p = [math.exp(z / temperature) for z in t]
        q = [math.exp(z / temperature) for z in s]
        p, q = [a / sum(p) for a in p], [a / sum(q) for a in q]
        by_hand += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 3
    assert float(losses.kl(teacher, student, temperature)) == pytest.approx(by_hand, rel=1e-5)
    assert float(losses.kl(student, teacher, temperature)) != pytest.approx(by_hand, rel=1e-2)  # it has a direction
    assert float(losses.kl(teacher, teacher + 3, temperature)) == pytest.approx(0, abs=1e-6)


def test_tokens_count_where_they_are_present(drawn):
    teacher, student = torch.randn(2, 3, 4, generator=drawn), torch.randn(2, 3, 4, generator=drawn)
    square = (teacher - student) ** 2
    assert float(losses.tokens(teacher, student, None)) == pytest.approx(float(square.sum()) / 24, rel=1e-5)
    present = torch.tensor([[True, False, True], [False, True, False]])
    by_hand = float(square[0, 0].sum() + square[0, 2].sum() + square[1, 1].sum()) / 12
    assert float(losses.tokens(teacher, student, present)) == pytest.approx(by_hand, rel=1e-5)
    student[0, 1] = 1e6
    assert float(losses.tokens(teacher, student, present)) == pytest.approx(by_hand, rel=1e-5)
    assert float(losses.tokens(teacher, student, torch.zeros(2, 3, dtype=torch.bool))) == 0


def test_features_weigh_the_prefix_as_much_as_all_patches():
    teacher, student = torch.full((2, 5, 3), 2.0), torch.full((2, 5, 3), 2.0)
    student[:, 0] = 3.0  # the prefix is off by 1, whose square is a quarter of the teacher's
    assert float(losses.features(teacher, student, None, 1)) == pytest.approx(0.25 / 2)
    student = torch.full((2, 5, 3), 2.0)
    student[:, 1:] = 4.0  # all patches are off by 2
    assert float(losses.features(teacher, student, None, 1)) == pytest.approx(1 / 2)
    assert float(losses.features(teacher, student, None, 0)) == pytest.approx(4 / 5)
    present = torch.tensor([[False, True, True, True]] * 2)
    student[:, 1] = -99.0  # the first patch has left
    assert float(losses.features(teacher, student, present, 1)) == pytest.approx(1 / 2)
    assert float(losses.features(teacher[:, :1], student[:, :1], None, 1)) == 0  # a prefix alone


def attention(drawn, images=6):
    target = torch.randn(images, 2, 3, 5, generator=drawn).softmax(-1)
    return target, torch.randn(images, 2, 3, 5, generator=drawn).softmax(-1)


def test_summed_squares_of_attention_count_the_reference_batch(drawn):
    target, estimate = attention(drawn)
    by_hand = float(((estimate - target) ** 2).sum())
    assert float(losses.attention(estimate, target, "mse-sum", 6).mean()) == pytest.approx(by_hand, rel=1e-5)
    assert float(losses.attention(estimate, target, "mse-sum", 168).mean()) == pytest.approx(28 * by_hand, rel=1e-5)


def test_kl_of_attention_is_nothing_for_the_same_and_something_otherwise(drawn):
    target, estimate = attention(drawn)
    assert losses.attention(target, target, "kl", 1).abs().max() < 1e-6
    assert losses.attention(7 * target, target, "kl", 1).abs().max() < 1e-6  # rows are normalised
    by_hand = (target * (target / estimate).log()).sum((1, 2, 3)) / (2 * 3)
    found = losses.attention(estimate, target, "kl", 1)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=0)
    assert (found > 0.1).all()
    assert losses.attention(-estimate, target, "kl", 1).isfinite().all()  # negative estimates are allowed to happen


def test_blocks_furthest_off_count_most_in_the_root_mean_square():
    errors = [torch.tensor([3.0, 0.0], requires_grad=True), torch.tensor([4.0, 0.0], requires_grad=True)]
    assert float(losses.over_blocks(errors, "mean").detach()) == pytest.approx(3.5 / 2)
    rms = losses.over_blocks(errors, "rms")
    assert float(rms.detach()) == pytest.approx((25 / 2) ** 0.5 / 2)
    rms.backward()
    assert errors[1].grad[0] / errors[0].grad[0] == pytest.approx(4 / 3)
    assert all(e.grad.isfinite().all() for e in errors)  # also where nothing is wrong


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from([1e-3, 0.05, 1.0, 20.0]), st.booleans())
def test_soft_top_sums_to_b_follows_the_order_and_ends_in_the_highest(seed, b, width, ties):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.round() if ties else x
    width = torch.full((3, 1), width, dtype=torch.float64)
    kept = losses.soft_top(x, b, width)
    assert ((kept >= 0) & (kept <= 1)).all()
    torch.testing.assert_close(kept.sum(-1), torch.full((3,), float(b), dtype=torch.float64), atol=0.01, rtol=0)
    order = x.argsort(-1)
    assert (kept.gather(-1, order).diff(dim=-1) >= 0).all()
    torch.testing.assert_close(losses.soft_top(x + 5, b, width), kept)
    if not ties:
        sharp = losses.soft_top(x, b, torch.full((3, 1), 1e-7, dtype=torch.float64))
        top = torch.zeros_like(x).scatter(-1, x.topk(b, -1).indices, 1.0)
        assert (sharp.round() == top).all()


def test_the_gradient_of_soft_top_is_that_of_its_values(drawn):
    x = torch.randn(2, 6, generator=drawn, dtype=torch.float64, requires_grad=True)
    width = torch.full((2, 1), 0.5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: losses.soft_top(x, 2, width), x, atol=1e-3)


def test_lost_mass_is_the_share_of_dropped_keys_once_the_step_is_sharp(drawn, monkeypatch):
    target, estimate = attention(drawn)
    monkeypatch.setattr(losses, "SOFTNESS", 1e-6)
    kept = torch.zeros_like(target).scatter(-1, estimate.topk(2, -1).indices, 1.0)
    by_hand = float(1 - (target * kept).sum(-1).mean())
    assert float(losses.lost_mass(estimate, target, [2])) == pytest.approx(by_hand, abs=5e-3)
    assert float(losses.lost_mass(estimate, target, [5])) == 0  # nothing is dropped


def test_flat_scores_do_not_pass_for_good_ones(drawn):
    """Of equal scores each key is kept by b / N; without a sum of b, all would be kept by half."""
    target, estimate = attention(drawn)
    assert float(losses.lost_mass(0 * estimate, target, [2])) == pytest.approx(1 - 2 / 5, abs=0.01)
    assert float(losses.lost_mass(target, target, [2])) < float(losses.lost_mass(0 * estimate, target, [2]))


@pytest.mark.parametrize("softness", [0.05, 0.5])
def test_learning_by_lost_mass_keeps_more(drawn, monkeypatch, softness):
    monkeypatch.setattr(losses, "SOFTNESS", softness)
    target, scores = attention(drawn)
    scores.requires_grad_()
    found = []
    for _ in range(60):
        kept = torch.zeros_like(target).scatter(-1, scores.detach().topk(2, -1).indices, 1.0)
        found.append(float((target * kept).sum(-1).mean()))
        (slope,) = torch.autograd.grad(losses.lost_mass(scores, target, [2]), scores)
        scores = (scores - 2 * slope).detach().requires_grad_()
    assert found[-1] > found[0] + 0.05


def parts(drawn):
    """Each loss of 6 images as a function of a slice of them."""
    t, s = torch.randn(6, 4, generator=drawn), torch.randn(6, 4, generator=drawn)
    z, w = torch.randn(6, 5, 3, generator=drawn), 3 * torch.randn(6, 5, 3, generator=drawn)
    target, estimate = attention(drawn)
    kept = torch.tensor([[True, False, True, True, False]]).expand(6, -1)  # as many of each image, as stages do
    return {
        "classification": lambda i: losses.classification(s[i], t.softmax(1)[i]),
        "kl": lambda i: losses.kl(t[i], s[i], 2.0),
        "tokens": lambda i: losses.tokens(z[i], w[i], None),
        "tokens present": lambda i: losses.tokens(z[i], w[i], kept[i]),
        "features": lambda i: losses.features(z[i] * (1 + torch.arange(6)[i, None, None]), w[i], None, 1),
        "features present": lambda i: losses.features(
            z[i] * (1 + torch.arange(6)[i, None, None]), w[i], kept[i, 1:], 1
        ),
        "attention mse-sum": lambda i: losses.attention(estimate[i], target[i], "mse-sum", 168).mean(),
        "attention kl": lambda i: losses.attention(estimate[i], target[i], "kl", 168).mean(),
        "attention rms": lambda i: losses.over_blocks(
            [losses.attention(e[i], target[i], "mse-sum", 1) for e in (estimate, 3 * estimate)], "rms"
        ),
        "mass": lambda i: losses.lost_mass(estimate[i], target[i], [2]),
    }


@pytest.mark.parametrize("name", parts(torch.Generator()))
def test_the_mean_over_equal_parts_is_the_whole(drawn, name):
    loss = parts(drawn)[name]
    whole = float(loss(slice(None)))
    for size in (1, 2, 3):
        values = [float(loss(slice(i, i + size))) for i in range(0, 6, size)]
        assert sum(values) / len(values) == pytest.approx(whole, rel=1e-5), size
