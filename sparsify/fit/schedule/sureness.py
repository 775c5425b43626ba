"""How sure each schedule of a calibrated classifier is of the calibration images, which adaptive inference is chosen by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from sparsify.config import SparsityConfig
from sparsify.measure.accuracy import classify, kl_terms
from sparsify.nn import graft, schedules
from sparsify.nn.adaptive import Sureness, margins


@torch.no_grad()
def measure(
    model: nn.Module,
    configs: Mapping[float, SparsityConfig],
    images: Iterable[Tensor],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[float, Sureness]:
    """`Sureness` of every schedule of a calibrated model, by budget; none where probabilities say nothing (`classify`).

    images: batches [B, C, H, W]; `progress` is called with the images done.
    """
    if getattr(model, "num_classes", 0) < 2:
        return {}
    dense, twins = graft.dense_twin(model), {b: schedules.applied(model, c) for b, c in configs.items()}
    found: dict[float, tuple[list[float], list[float]]] = {budget: ([], []) for budget in configs}
    done = 0
    for x in images:
        expected = dense(x)
        if not classify(expected):
            return {}
        for number, (budget, twin) in enumerate(twins.items(), 1):
            logits = twin(x)
            found[budget][0].extend(margins(logits).tolist())
            differs = expected.argmax(1) != logits.argmax(1)
            found[budget][1].extend((kl_terms(expected, logits).sum(-1) + differs).tolist())
            progress(done + len(x) * number // len(twins))
        done += len(x)
    return {budget: Sureness(*(tuple(_short(v) for v in values) for values in both)) for budget, both in found.items()}


def _short(value: float) -> float:
    """Four digits, which is what a file has of it."""
    return float(f"{value:.4g}")
