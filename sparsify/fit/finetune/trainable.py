"""What a stage trains, and how: parameters, optimiser, learning rate, stochastic depth, keep."""

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


def select_parameters(model: nn.Module, stage: Stage) -> list[str]:
    """Names of the parameters that a stage trains; all others are frozen, in place. Raises `UsageError` if there are none.

    Predictors are trained only by the losses that reach them: the choice of keys has no gradient.
    """
    predictors = stage.moves_predictors and stage.losses.predictors
    inside = tuple(f"{name}.predictor." for name in attention.sparse_modules(model))
    backbone: tuple[str, ...] = ("",) if stage.moves_backbone else ()  # every name starts with ''
    if stage.train == "attention":
        backbone = tuple(f"{name}." for name in attention.attention_modules(model))
    names = []
    for name, parameter in model.named_parameters():
        trained = predictors if name.startswith(inside) else name.startswith(backbone)
        parameter.requires_grad_(trained)
        names += [name] if trained else []
    if not names:
        reason = "this model's predictors have no parameters of their own"
        raise UsageError(f"stage '{stage.name}' trains nothing: {reason}")
    return names


def make_optimiser(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """timm's optimiser over the trainable parameters; `UsageError` where timm has none, or it refuses an argument."""
    unset = {name for name in ("betas", "eps") if getattr(stage.optimiser, name) is None}
    options = stage.optimiser.model_dump(exclude={"name", "clip_grad"} | unset)
    try:
        return create_optimizer_v2(model, opt=stage.optimiser.name, **options)
    except Exception as error:
        raise UsageError(f"stage '{stage.name}', optimiser '{stage.optimiser.name}': {one_line(error)}") from None


def lr_schedule(optimizer: torch.optim.Optimizer, stage: Stage, steps: int, steps_per_epoch: int) -> Scheduler:
    """timm's schedule of the learning rate by optimiser steps (`step_update`)."""
    s = stage.schedule
    warmup = min(steps - 1, max(round(s.warmup * steps_per_epoch), round(s.warmup_share * steps)))
    options: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": s.warmup_lr, "t_in_epochs": False}
    if s.name == "constant":
        return StepLRScheduler(optimizer, decay_t=steps + 1, decay_rate=1.0, **options)
    return CosineLRScheduler(optimizer, t_initial=steps, lr_min=s.min_lr, **options)


def steps_of(stage: Stage, steps_per_epoch: int | None) -> int:
    """Optimiser steps of a stage; steps_per_epoch None: of a stream, whose epochs have no length (`UsageError`)."""
    if steps_per_epoch is None and stage.steps is None:
        raise UsageError(f"stage '{stage.name}': a stream has no known length: give steps instead of epochs")
    limits = [] if stage.steps is None else [stage.steps]
    if steps_per_epoch is not None and stage.epochs is not None:
        limits.append(max(1, round(stage.epochs * steps_per_epoch)))
    return min(limits)


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth, rising linearly from 0 to `rate` over the blocks, in place; 0 removes it."""
    blocks = cast(Any, model).blocks
    for i, block in enumerate(blocks):
        share = rate * i / max(1, len(blocks) - 1)
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(share) if share > 0 else nn.Identity())


class KeepSchedule:
    """The keep of each block during a stage: the model's own, a number, or annealed from a number to the model's own."""

    def __init__(self, model: nn.Module, stage: Stage, steps: int) -> None:
        self.modules = list(attention.sparse_modules(model).values())
        self.targets = [module.sparsity.keeps for module in self.modules]
        self.keep, self.steps = stage.keep, steps

    def set_step(self, step: int | None) -> None:
        """Sets the keeps for a step, counted from 0; None: the model's own."""
        if self.keep is None:
            return
        for module, targets in zip(self.modules, self.targets, strict=True):
            keeps = targets
            if step is not None and isinstance(self.keep, Anneal):
                start, remaining = self.keep.start, max(0.0, 1 - step / max(1.0, self.keep.until * self.steps))
                keeps = tuple(target + (max(target, start) - target) * remaining for target in targets)
            elif step is not None:
                keeps = (cast(float, self.keep),)
            module.sparsity = dataclasses.replace(module.sparsity, keeps=keeps)
