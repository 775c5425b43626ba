"""Several schedules over one backbone: one is in use, and what the others need rests in the model.

A schedule is a configuration found for a budget, a fraction of the dense model's cost. Schedules of a model differ in
`keep`, `rank`, `cells` and `tokens` alone. A block that is dense in the one in use keeps the predictor of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn

from sparsify.config import BlockPlan, SparsityConfig, grid_of
from sparsify.errors import UsageError, field
from sparsify.nn import graft, hosts, methods, token_models
from sparsify.nn.attention import DenseAttention, SparseAttention, attention_modules
from sparsify.nn.methods import ModelMethod

DENSE = 1.0  # the budget of dense attention over all tokens, which every model has
MOVES = ("keep", "rank", "cells", "tokens")  # fields in which schedules of a model may differ


def apply(model: nn.Module, config: SparsityConfig, others: Iterable[SparsityConfig] = ()) -> nn.Module:
    """Set other keeps, ranks, cells and token stages in a model with fitted predictors, in place.

    Args:
        others: configurations that are to stay possible; what neither they nor `config` need is forgotten.

    Raises:
        UsageError: a configuration does not fit, or makes a block without a predictor sparse.
    """
    token_models.remove(model)
    attentions, others = attention_modules(model), list(others)
    shape = hosts.geometry(model, attentions)
    by_block = zip(*(each.resolved(shape) for each in (config, *others)), strict=True)
    for i, ((name, module), plans) in enumerate(zip(attentions.items(), by_block, strict=True)):
        sparse, predictor = [plan for plan in plans if plan.keeps is not None], module.predictor
        if sparse and predictor is None:
            raise UsageError(f"block {i + 1} has no predictor: its attention is dense and cannot be made sparse here")
        if predictor is not None and sparse:
            predictor.trim(max(max(plan.ranks) for plan in sparse))
        model.set_submodule(name, _planned(model, module, config, plans[0], bool(sparse)))
    graft.set_token_stages(model, config, others)
    return model


def _planned(model: nn.Module, module: Any, config: SparsityConfig, plan: BlockPlan, rests: bool) -> nn.Module:
    """The attention of one block by its plan; rests: it keeps its predictor where the plan is dense."""
    if plan.keeps is None:
        return DenseAttention(module, predictor=module.predictor if rests else None).train(module.training)
    if not isinstance(module, SparseAttention):
        sparsity = graft.sparsity_of(model, config, plan)
        module = SparseAttention(module, module.predictor, sparsity).train(module.training)
    module.set_plan(plan)
    return cast(nn.Module, module)


def applied(model: nn.Module, config: SparsityConfig) -> nn.Module:
    """A copy changed by `apply`; it shares every parameter and buffer with `model`, and has no other schedules."""
    other = apply(graft.shared_copy(model), config)
    other.__dict__.pop(SetBudget.NAME, None)
    return other


def densely(model: nn.Module) -> nn.Module:
    """A copy with dense attention, over the tokens present, in every block; parameters and schedules as of `applied`."""
    other = graft.shared_copy(model)
    for name, module in attention_modules(other).items():
        if isinstance(module, SparseAttention):
            other.set_submodule(name, DenseAttention(module).train(module.training))
    if isinstance(other, token_models.TokenModel):
        other.track_owners = False  # only predictors need them
    other.__dict__.pop(SetBudget.NAME, None)
    return other


def dense_of(config: SparsityConfig) -> SparsityConfig:
    """The schedule of budget 1: dense attention, all tokens."""
    return config.model_copy(update={"keep": "dense", "tokens": None})


def check_alike(schedules: Iterable[SparsityConfig]) -> None:
    """Raise `UsageError` where schedules differ in more than `MOVES`, or remove tokens in different ways."""
    first, *rest = schedules
    fixed = first.model_dump(exclude=set(MOVES))
    if any(each.model_dump(exclude=set(MOVES)) != fixed for each in rest):
        raise UsageError(f"schedules of one model differ in {', '.join(MOVES)} alone")
    if len({(each.tokens.way, each.tokens.importance) for each in (first, *rest) if each.tokens}) > 1:
        raise UsageError("schedules of one model remove tokens in one way")


class SetBudget(ModelMethod):
    """`model.set_budget(0.55)`: the schedule of that budget from the next call on; see `offer`.

    Attributes:
        budgets: that can be set, from the largest, 1, which is dense attention over all tokens.
        budget: the one in use.
    """

    NAME = "set_budget"

    def __init__(self, model: nn.Module | None, schedules: Mapping[float, SparsityConfig], budget: float) -> None:
        super().__init__(model, dict(schedules), budget)
        self.schedules = self.state[0]
        self.budgets, self.budget = tuple(sorted({DENSE, *schedules}, reverse=True)), budget

    def __call__(self, budget: float) -> None:
        """Set the schedule of this budget; not while another thread calls the model. `UsageError`: there is none."""
        if budget != self.budget:
            apply(self.model, self.at(budget), self.schedules.values())
            self.state, self.budget = (self.schedules, budget), budget

    def at(self, budget: float) -> SparsityConfig:
        """The schedule of a budget; `UsageError`: there is none."""
        if budget == DENSE and budget not in self.schedules:
            return dense_of(next(iter(self.schedules.values())))
        if budget not in self.schedules:
            raise none_for(budget, self.schedules)
        return cast(SparsityConfig, self.schedules[budget])

    def resized(self, factor: float) -> None:
        for budget, config in self.schedules.items():
            self.schedules[budget] = config.model_copy(update={"cells": _grown(config.cells, factor)})

    def __repr__(self) -> str:
        return f"set_budget({' | '.join(f'{b:g}' for b in self.budgets)}), now {self.budget:g}"


def offer(model: nn.Module, schedules: Mapping[float, SparsityConfig], budget: float) -> None:
    """Gives `model`, grafted by the schedule of `budget` with the others possible, its method `set_budget`."""
    cast(Any, model).set_budget = SetBudget(model, schedules, budget)


def offered(model: nn.Module) -> SetBudget | None:
    """The method `set_budget` of a model, if it has several schedules."""
    found = methods.of(model).get(SetBudget.NAME)
    return found if isinstance(found, SetBudget) else None


def none_for(budget: float, budgets: Iterable[float]) -> UsageError:
    """The error of a budget that no schedule was chosen for."""
    known = ", ".join(f"{each:g}" for each in sorted(budgets, reverse=True))
    have = f"this file has schedules for {known}" if known else "this file has one schedule, chosen for no budget"
    return UsageError(f"{field('budget')} {budget:g}: {have}; 1 is dense attention over all tokens")


def _grown(cells: Any, factor: float) -> Any:
    """Grids of cells with about `factor` times as many: one, or lists of them."""
    if cells is None:
        return None
    return (
        grid_of(cells[0] * cells[1] * factor) if isinstance(cells[0], int) else tuple(_grown(c, factor) for c in cells)
    )
