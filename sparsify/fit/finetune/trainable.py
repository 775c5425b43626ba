"""What a stage moves, and with what: trainable parameters, optimiser, learning rate, running mean, keep."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch import nn

from sparsify.errors import UsageError, one_line
from sparsify.nn import attention
from sparsify.recipe import Anneal, Stage


def trainable(model: nn.Module, stage: Stage) -> list[str]:
    """Names of the parameters that a stage may move; everything else is frozen, in place.

    The predictors are moved only by the losses that reach them: the choice of keys has no gradient.

    Raises:
        UsageError: there are none.
    """
    predictors = stage.moves_predictors and stage.losses.predictors
    inside = tuple(f"{name}.predictor." for name in attention.sparse_modules(model))
    backbone: tuple[str, ...] = ("",) if stage.moves_backbone else ()
    if stage.train == "attention":
        backbone = tuple(f"{name}." for name in attention.attention_modules(model))
    names = []
    for name, parameter in model.named_parameters():
        moves = predictors if name.startswith(inside) else name.startswith(backbone)  # every name starts with ''
        parameter.requires_grad_(moves)
        names += [name] if moves else []
    if not names:
        raise UsageError(
            f"stage '{stage.name}' trains nothing: this model's predictors have no parameters of their own"
        )
    return names


def optimiser(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """timm's optimiser over the trainable parameters of `model`.

    Raises:
        UsageError: timm has no such optimiser, or it refuses an argument.
    """
    o = stage.optimiser
    options: dict[str, Any] = {} if o.betas is None else {"betas": o.betas}
    if o.eps is not None:
        options["eps"] = o.eps
    try:
        return create_optimizer_v2(
            model, opt=o.name, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum, layer_decay=o.layer_decay,
            **options,
        )  # fmt: skip
    except Exception as error:
        raise UsageError(f"stage '{stage.name}', optimiser '{o.name}': {one_line(error)}") from None


def schedule(optimizer: torch.optim.Optimizer, stage: Stage, steps: int, steps_per_epoch: int) -> Scheduler:
    """timm's schedule of the learning rate by optimiser steps (`step_update`)."""
    s = stage.schedule
    warmup = min(steps - 1, max(round(s.warmup * steps_per_epoch), round(s.warmup_share * steps)))
    options: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": s.warmup_lr, "t_in_epochs": False}
    if s.name == "constant":
        return StepLRScheduler(optimizer, decay_t=steps + 1, decay_rate=1.0, **options)
    return CosineLRScheduler(optimizer, t_initial=steps, lr_min=s.min_lr, **options)


def steps_of(stage: Stage, steps_per_epoch: int | None) -> int:
    """Optimiser steps of a stage.

    Raises:
        UsageError: epochs of a stream, whose length nobody knows.
    """
    if steps_per_epoch is None:
        if stage.steps is None:
            raise UsageError(f"stage '{stage.name}': a stream has no known length: give steps instead of epochs")
        return stage.steps
    limits = [] if stage.epochs is None else [max(1, round(stage.epochs * steps_per_epoch))]
    return min(limits if stage.steps is None else [*limits, stage.steps])


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth, rising linearly from 0 to `rate` over the blocks, in place; 0 takes it out."""
    blocks = list(cast(Any, model).blocks)
    for i, block in enumerate(blocks):
        share = rate * i / max(1, len(blocks) - 1)
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(share) if share > 0 else nn.Identity())


class Keeps:
    """The share of keys that each block keeps while a stage goes on: the model's own, a number, or annealed to its own."""

    def __init__(self, model: nn.Module, stage: Stage, steps: int) -> None:
        self.modules = list(attention.sparse_modules(model).values())
        self.own = [module.sparsity.keep for module in self.modules]
        self.keep, self.steps = stage.keep, steps

    def at(self, step: int) -> None:
        """Sets the shares for a step, counted from 0."""
        if self.keep is None:
            return
        for module, own in zip(self.modules, self.own, strict=True):
            now = self.keep
            if isinstance(now, Anneal):
                left = max(0.0, 1 - step / max(1.0, now.until * self.steps))
                now = own + (max(own, now.start) - own) * left
            module.sparsity = dataclasses.replace(module.sparsity, keep=now)

    def reset(self) -> None:
        """The model's own shares again."""
        for module, own in zip(self.modules, self.own, strict=True):
            module.sparsity = dataclasses.replace(module.sparsity, keep=own)
