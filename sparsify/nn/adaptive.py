"""Two schedules of one classifier: a cheap one for every image, and a costlier one again for those it is unsure of.

With p the class probabilities of the cheap schedule for image i, the largest first, and t the threshold,

    margin_i = p_(1) - p_(2)
    logits_i = those of the first schedule where margin_i >= t, else those of the second

Pair and threshold for a mean cost are chosen from the margins of calibration images, without labels (`choose`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from sparsify.errors import UsageError, field
from sparsify.nn import schedules
from sparsify.nn.schedules import DENSE


class Sureness(NamedTuple):
    """How sure a schedule is of each calibration image, and how far it is from dense there."""

    margins: tuple[float, ...]
    distances: tuple[float, ...]  # KL(dense || sparse) in nats, and 1 more where the predicted class is another


class Rule(NamedTuple):
    """Which schedules run, and for which images."""

    first: float  # budget of the schedule that every image runs
    second: float  # budget of the one that the unsure run again
    margin: float  # those with a smaller margin run again
    share: float  # of the calibration images that do

    @property
    def cost(self) -> float:
        """Mean cost of a calibration image, as a fraction of dense."""
        return self.first + self.share * self.second

    def words(self) -> str:
        """One line for people."""
        again = f"{100 * self.share:.1f} % of the calibration images (margin below {self.margin:.3g}) again at"
        return f"adaptive: budget {self.first:g}, {again} {self.second:g}: {self.cost:.3f} of dense in the mean"


def margins(logits: Tensor) -> Tensor:
    """Largest less second largest class probability of logits [B, classes]: [B], 0 to 1."""
    best = logits.float().softmax(-1).topk(2, -1).values
    return best[:, 0] - best[:, 1]


def choose(known: Mapping[float, Sureness], cost: float) -> Rule:
    """The rule of mean cost up to `cost` whose outputs are nearest to dense over the calibration images.

    known: of each schedule, by budget; the second schedule may also be the dense one.

    Raises:
        UsageError: a cost below the cheapest budget, or above 1.
    """
    if not min(known) <= cost <= DENSE:
        raise UsageError(f"{field('adaptive')} {cost:g}: this file takes a mean cost from {min(known):g} to 1")
    found: list[tuple[float, float, Rule]] = []
    for first, second in product(known, {*known, DENSE}):
        if first <= cost and first < second:
            sure, other = known[first], known.get(second)
            order = sorted(range(len(sure.margins)), key=sure.margins.__getitem__)
            n = len(order)
            k = min(n, int((cost - first) / second * n + 1e-9))
            distances = [*(sure.distances[i] for i in order[k:]), *(other.distances[i] for i in order[:k] if other)]
            edge = (0.0, *(sure.margins[i] for i in order), 1.0)
            margin = 0.0 if k == 0 else (edge[k] + edge[k + 1]) / 2
            rule = Rule(first, second, margin, k / n)
            found.append((sum(distances) / n, rule.cost, rule))
    return min(found)[2]


class Adaptive(nn.Module):
    """A classifier in eval mode that runs `first` on all images and `second` on those that it is unsure of.

    Args:
        first, second: models of one classifier; they may share parameters.
        rule: how they were chosen; `rule.margin` is the threshold.

    An image's logits do not depend on what else is in its batch. For inference: neither training nor features.
    """

    def __init__(self, first: nn.Module, second: nn.Module, rule: Rule) -> None:
        super().__init__()
        self.first, self.second, self.rule = first, second, rule
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]."""
        logits = cast(Tensor, self.first(x))
        again = ~(margins(logits) >= self.rule.margin)  # NaN is unsure
        if not bool(again.any()):
            return logits
        return logits.index_copy(0, again.nonzero().squeeze(1), self.second(x[again]))

    @property
    def num_classes(self) -> int:
        return int(cast(Any, self.first).num_classes)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's words for preprocessing and classes."""
        return cast(dict[str, Any], self.first.pretrained_cfg)

    def extra_repr(self) -> str:
        return self.rule.words()


def adaptive(model: nn.Module, rule: Rule) -> Adaptive:
    """The adaptive form of a model with several schedules (`sparsify.nn.schedules.offer`); it shares all parameters."""
    several = schedules.offered(model)
    assert several is not None
    first, second = (schedules.applied(model, several.at(budget)) for budget in (rule.first, rule.second))
    return Adaptive(first, second, rule)


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """Inside, the images that an `Adaptive` model runs twice are counted, under 'twice'; of another model none."""
    count: Counter[str] = Counter()
    hook = None
    if isinstance(model, Adaptive):
        hook = model.second.register_forward_pre_hook(lambda _, inputs: count.update(twice=len(inputs[0])))
    try:
        yield count
    finally:
        if hook is not None:
            hook.remove()


def lead(model: nn.Module) -> nn.Module:
    """The model that describes `model`: its image size, classes and preprocessing."""
    return model.first if isinstance(model, Adaptive) else model
