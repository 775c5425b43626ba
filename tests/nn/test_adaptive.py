"""Adaptive inference: which images run twice, and by which two schedules."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsify.errors import UsageError
from sparsify.nn.adaptive import Adaptive, Rule, Sureness, choose, counting, margins


class Answers(nn.Module):
    """A classifier of 'images' [B, 2]: its logits are their numbers, times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.rows = factor, 0
        self.num_classes, self.pretrained_cfg = 2, {"num_classes": 2}

    def forward(self, x):
        self.rows += len(x)
        return self.factor * x


def two(margin):
    return Adaptive(Answers(1.0), Answers(10.0), Rule(0.4, 1.0, margin, 0.5))


def test_the_unsure_run_again_and_stay_in_their_place():
    x = torch.tensor([[2.0, 0.0], [0.1, 0.0], [0.0, 0.0], [0.0, 3.0]])  # margins 0.76, 0.05, 0, 0.91
    model = two(0.5)
    with counting(model) as counted:
        out = model(x)
    assert torch.equal(out, torch.stack([x[0], 10 * x[1], 10 * x[2], x[3]]))
    assert (model.first.rows, model.second.rows, counted["twice"]) == (4, 2, 2)
    assert model.num_classes == 2 and model.pretrained_cfg == {"num_classes": 2}


@pytest.mark.parametrize("margin, twice", [(0.0, 0), (1.0, 5)])
def test_none_or_all_run_again(margin, twice):
    model = two(margin)
    model(torch.zeros(5, 2))
    assert model.second.rows == twice
    assert two(margin)(torch.zeros(0, 2)).shape == (0, 2)


def test_an_output_that_is_not_finite_runs_again():
    x = torch.tensor([[float("nan"), 0.0], [5.0, 0.0]])
    assert two(0.5)(x)[1].tolist() == [5.0, 0.0] and two(0.5)(x)[0].isnan().any()


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=6), st.floats(0, 1), st.randoms())
def test_an_image_gets_the_same_in_any_batch(rows, margin, draw):
    x, model = torch.tensor(rows), two(margin)
    together = model(x)
    assert torch.equal(together, torch.cat([model(x[i : i + 1]) for i in range(len(x))]))
    order = draw.sample(range(len(x)), len(x))
    assert torch.equal(together[order], model(x[order]))


def test_margins_of_probabilities():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]])
    torch.testing.assert_close(margins(p.log()), torch.tensor([0.5, 0.0]))


def sure(margin, distance):
    return Sureness(tuple(margin), tuple(distance))


KNOWN = {
    0.4: sure([0.9, 0.1, 0.6, 0.3], [0.0, 0.8, 0.1, 0.4]),
    0.6: sure([0.9, 0.2, 0.7, 0.5], [0.0, 0.1, 0.0, 0.0]),
}


def test_rule_by_hand():
    assert choose(KNOWN, 0.4) == Rule(0.4, 0.6, 0.0, 0.0)  # no room for a second run: the cheapest alone
    # 0.55: a quarter again at 0.6 costs 0.55 and leaves (0.1 + 0.1 + 0.4) / 4; dense would cost 0.65
    assert choose(KNOWN, 0.55) == Rule(0.4, 0.6, 0.2, 0.25)
    # 0.65: a quarter again on dense leaves (0.1 + 0.4) / 4; 0.6 alone leaves 0.1 / 4
    rule = choose(KNOWN, 0.65)
    assert rule == Rule(0.6, 1.0, 0.0, 0.0) and rule.cost == 0.6
    assert choose(KNOWN, 0.85) == Rule(0.6, 1.0, (0.2 + 0.5) / 2, 0.25)  # exact
    assert (
        "25.0 % of the calibration images (margin below 0.35) again at 1: 0.850 of dense" in choose(KNOWN, 0.85).words()
    )


@pytest.mark.parametrize("cost", [0.39, 1.01, -1.0])
def test_a_cost_that_no_pair_has_is_refused(cost):
    with pytest.raises(UsageError, match="from 0.4 to 1"):
        choose(KNOWN, cost)


@given(
    st.lists(st.tuples(*(st.floats(0, 1) for _ in range(4))), min_size=1, max_size=8),
    st.floats(0.3, 1.0),
)
def test_rule_is_the_best_of_all_and_keeps_to_its_cost(images, cost):
    columns = [*zip(*images, strict=True)]
    known = {0.3: sure(*columns[:2]), 0.7: sure(*columns[2:])}
    rule, n = choose(known, cost), len(images)

    def damage(first, second, k):
        order = sorted(range(n), key=known[first].margins.__getitem__)
        other = known[second].distances if second in known else (0.0,) * n
        return sum(known[first].distances[i] for i in order[k:]) + sum(other[i] for i in order[:k])

    assert rule.cost <= cost + 1e-6
    below = [m < rule.margin for m in known[rule.first].margins]
    distinct = len(set(known[rule.first].margins)) == n
    assert not distinct or sum(below) == pytest.approx(rule.share * n)
    best = min(
        damage(first, second, int((cost - first) / second * n + 1e-9))
        for first, second in itertools.combinations((0.3, 0.7, 1.0), 2)
        if first <= cost and (cost - first) / second <= 1
    )
    assert damage(rule.first, rule.second, round(rule.share * n)) <= best + 1e-9
