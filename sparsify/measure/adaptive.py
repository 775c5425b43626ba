"""Cost of adaptive inference (`sparsify.nn.adaptive`): of an image in the mean, and of one that runs twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsify.errors import UsageError
from sparsify.measure import latency, macs
from sparsify.measure.conditions import PROFILE, conditions
from sparsify.measure.latency import Timing
from sparsify.measure.profile import profile
from sparsify.nn import graft, guard
from sparsify.nn.adaptive import Adaptive, Rule
from sparsify.processes import Compute

DENSE, FIRST, SECOND = "dense", "first", "second"


@dataclass(frozen=True)
class AdaptiveProfile:
    """Costs of both schedules beside dense; MACs per image, theoretical. Times of one interleaved run, if measured."""

    rule: Rule
    macs: Mapping[str, int]  # of dense, first and second
    times: Mapping[str, Timing]  # ms per batch of each; empty: nothing was measured
    conditions: Mapping[str, Any]

    def mean(self, costs: Mapping[str, float]) -> float:
        """Mean cost, if as many images run twice as of the calibration images."""
        return costs[FIRST] + self.rule.share * costs[SECOND]

    def worst(self, costs: Mapping[str, float]) -> float:
        """Cost of a batch of which all images run twice."""
        return costs[FIRST] + costs[SECOND]

    @property
    def medians(self) -> dict[str, float]:
        """ms per batch."""
        return {name: timing.median for name, timing in self.times.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and mean and worst of MACs and ms."""
        costs: dict[str, Mapping[str, float]] = {"macs": self.macs, **({"ms": self.medians} if self.times else {})}
        derived = {
            f"{name}_{what}": getattr(self, name)(cost) for what, cost in costs.items() for name in ("mean", "worst")
        }
        return {
            "rule": self.rule._asdict(),
            "macs": dict(self.macs),
            "ms": {name: asdict(timing) for name, timing in self.times.items()},
            **derived,
            "conditions": dict(self.conditions),
        }


def profile_adaptive(
    model: nn.Module, *, measure: bool = True, compute: Compute = Compute(), budget: latency.Budget = latency.Budget()
) -> AdaptiveProfile:
    """Counts and, unless `measure=False`, times the two schedules of a model, by `auto`, beside its dense form.

    Args:
        compute, budget: of the measurement, as of `sparsify.measure.profile.profile`, which raises the same errors.

    Raises:
        UsageError: not an adaptive model.
    """
    if not isinstance(model, Adaptive):
        raise UsageError("not an adaptive model: sparsify.load(path, adaptive=...) gives one")
    first, second = (profile(each, measure=False) for each in (model.first, model.second))
    assert first.macs_dense is not None
    counted = {DENSE: first.macs_dense, FIRST: first.macs_sparse, SECOND: second.macs_sparse}
    image = macs.image_shape(model.first)
    circumstances: dict[str, Any] = {"img_size": list(image[1:])}
    times: dict[str, Timing] = {}
    if measure:
        device, dtype = compute.torch_device, compute.torch_dtype
        models = {DENSE: graft.dense_twin(model.first), FIRST: model.first, SECOND: model.second}
        models = {name: macs.replica(each, device=device, dtype=dtype) for name, each in models.items()}
        for name in (FIRST, SECOND):
            guard.set_backend(models[name], compute.backend, compute.kernel_precision)
        images = torch.randn(compute.batch_size or 1, *image, generator=torch.Generator().manual_seed(0))
        images = images.to(device, dtype)  # (B, C, H, W)
        candidates = {name: partial(each, images) for name, each in models.items()}
        times = latency.interleaved(candidates, rounds=budget.rounds, budget_s=budget.seconds, device=device)
        known = {"batch_size": len(images), "device": str(device), "runs": times[FIRST].runs}
        circumstances |= conditions(PROFILE, compute, **known)
    return AdaptiveProfile(model.rule, counted, times, circumstances)
