"""Warm-up: a loaded model meets its input shapes before the first request, so that none waits for what is done once.

Once for a shape: `ops.auto` decides by measuring, `nn.guard` holds the whole model against dense attention, and the kernels
are built and loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.utils import unwrap_model
from torch import nn

from sparsify.errors import UsageError, field
from sparsify.nn import hosts, schedules
from sparsify.nn.adaptive import Adaptive, lead


def warm_up(model: nn.Module, shapes: Sequence[Sequence[int]]) -> None:
    """Runs a model in eval mode once for each shape (B, 3, H, W) and each budget that it offers; the budget stays.

    The second model of an adaptive one meets any part of a batch: it runs for 1 to B images.

    Raises:
        UsageError: a shape that the model does not take; nothing is run then.
    """
    for shape in shapes:
        _check(lead(model), shape)
    for batch, *image in shapes:
        if isinstance(model, Adaptive):
            _every_budget(model.first, (batch, *image))
            for part in range(1, batch + 1):
                _every_budget(model.second, (part, *image))
        else:
            _every_budget(model, (batch, *image))


@torch.inference_mode()
def _every_budget(model: nn.Module, shape: tuple[int, ...]) -> None:
    like = next(model.parameters())
    x, several = torch.zeros(shape, dtype=like.dtype, device=like.device), schedules.offered(unwrap_model(model))
    if several is None:
        model(x)
        return
    for budget in [*(b for b in several.budgets if b != several.budget), several.budget]:
        several(budget)
        model(x)


def _check(model: nn.Module, shape: Sequence[int]) -> None:
    """Raise `UsageError` for what is no shape of images that the model takes."""
    height, width = hosts.image_size(model)
    whole = isinstance(shape, Sequence) and len(shape) == 4 and all(isinstance(n, int) and n > 0 for n in shape)
    if not whole or shape[1] != 3 or (tuple(shape[2:]) != (height, width) and not hosts.takes_any_size(model)):
        expected = f"shapes (B, 3, {height}, {width}) are expected, as in [(1, 3, {height}, {width})]"
        raise UsageError(f"{field('warmup')} {shape}: {expected}")
