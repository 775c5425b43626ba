"""Replaces the attention of a supported host model (`sparsify.nn.hosts`) by sparse attention, and changes it afterwards."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from sparsify.config import BlockPlan, SparsityConfig, growth
from sparsify.errors import UsageError
from sparsify.nn import hosts, methods, projection, token_models
from sparsify.nn.attention import (
    DenseAttention,
    GraftedAttention,
    SparseAttention,
    Sparsity,
    attention_modules,
    sparse_modules,
)
from sparsify.nn.methods import ModelMethod
from sparsify.nn.predictor import HeadLowrankPredictor, Predictor, TokenLowrankPredictor
from sparsify.ops.tails import TAILS


def graft(
    model: nn.Module,
    config: SparsityConfig,
    predictors: Sequence[Predictor | None] | None = None,
    others: Sequence[SparsityConfig] = (),
) -> nn.Module:
    """Replace every block's attention by a sparse (or our dense) one, and install the token stages; in place.

    Args:
        predictors: one for each block, None where its attention is dense; None: unfitted ones (`new_predictor`).
        others: configurations that are to stay possible (`sparsify.nn.schedules`).

    Raises:
        UnsupportedModel: see `hosts.supported_attentions`; nothing is replaced then.
        UsageError: a list or a rank in `config` or one of `others` that does not fit the model.
    """
    attentions, plans = hosts.supported_attentions(model), plans_of(model, config)
    if predictors is None:
        every = zip(plans, *(plans_of(model, other) for other in others), strict=True)
        pairs = zip(attentions.values(), every, strict=True)
        predictors = [_predictor_for(model, host, config, each) for host, each in pairs]
    for (name, host), plan, predictor in zip(attentions.items(), plans, predictors, strict=True):
        model.set_submodule(name, _grafted(model, host, config, plan, predictor))
    if any(each.tokens is not None for each in (config, *others)):
        set_token_stages(model, config, others)
    if hasattr(type(model), "set_input_size"):
        cast(Any, model).set_input_size = _SetInputSize(model)
    return model


def plans_of(model: nn.Module, config: SparsityConfig) -> tuple[BlockPlan, ...]:
    """The plan of each block of a dense model; raises as `graft` does."""
    plans = config.resolved(hosts.geometry(model, hosts.supported_attentions(model)))
    if config.tokens is not None:
        token_models.check_host(model)
    return plans


def filled(model: nn.Module, config: SparsityConfig) -> SparsityConfig:
    """`config` with what depends on the model written out, as files have it: cells and token stages."""
    tokens = config.tokens and config.tokens.with_stages(len(cast(Sequence[nn.Module], model.blocks)))
    return config.model_copy(update={"tokens": tokens}).with_cells(hosts.num_tokens(model))


def set_token_stages(model: nn.Module, config: SparsityConfig, others: Iterable[SparsityConfig] = ()) -> None:
    """Install the token stages of `config.tokens` (None: remove them) in a grafted model, in place.

    A block keeps its fitted importance if its stage uses it, by `config` or one of `others`; a block that needs one and has
    none gets zeros.

    Raises:
        UsageError: see `Tokens.check`.
    """
    token_models.remove(model)
    attentions = list(attention_modules(model).values())
    depth = len(attentions)
    if config.tokens is not None:
        config.tokens.check(depth, hosts.num_prefix_tokens(model))
    fitted = zip(*(fits_importance(each, depth) for each in (config, *others)), strict=True)
    for attention, is_fitted in zip(attentions, fitted, strict=True):
        if not any(is_fitted):
            attention.importance = None
        elif attention.importance is None:
            weight = projection.weight(attention)
            attention.importance = weight.new_zeros(projection.channels(attention) + 1)
    if config.tokens is not None:
        owners = config.tokens.way == "merge" and needs_owners(model)
        token_models.install(model, config.tokens.way, config.tokens.shares(depth), owners)


def needs_owners(model: nn.Module) -> bool:
    """Whether a predictor of `model` needs to know which patches were merged into each token."""
    return any(module.predictor.needs_owners for module in sparse_modules(model).values())


def fits_importance(config: SparsityConfig, depth: int) -> tuple[bool, ...]:
    """For each block, whether it has a stage that uses a fitted importance and keeps some patch tokens."""
    if config.tokens is None or config.tokens.importance != "fitted":
        return (False,) * depth
    return tuple(bool(share) for share in config.tokens.shares(depth))


def shallow_copy(model: nn.Module) -> nn.Module:
    """The same modules and tensors in a model whose attributes are its own."""
    return methods.renew(copy.copy(model))


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy without sparsity; it shares every parameter and buffer with `model`."""
    twin = shared_copy(model)
    for name, module in attention_modules(twin).items():
        twin.set_submodule(name, module.dense())
    token_models.remove(twin)
    for name in methods.of(twin):
        delattr(twin, name)
    return twin


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo=cast(dict, tensors))


def new_predictor(
    model: nn.Module,
    host: nn.Module,
    config: SparsityConfig,
    plan: BlockPlan,
    fold: bool | None = None,
    width: int | None = None,
) -> Predictor | None:
    """An unfitted predictor for one block, with dtype and device of the host; None where the plan is dense.

    fold: fold head-lowrank where that is exact; None: as `config.fold`. `set_basis` does the folding, not this function.
    width: see `HeadLowrankPredictor`.
    """
    if plan.keeps is None:
        return None
    heads, head_dim = projection.heads_of(host), projection.head_dim(host)
    predictor: Predictor
    if config.predictor == "head-lowrank":
        fold = (config.fold if fold is None else fold) and projection.foldable(host, hosts.rotary(model))
        predictor = HeadLowrankPredictor(head_dim, plan.ranks, fold, width)
    else:
        knobs = config.token_lowrank.model_dump()
        prefix, tokens = hosts.num_prefix_tokens(model), hosts.num_tokens(model)
        predictor = TokenLowrankPredictor(heads, head_dim, tokens, prefix, plan.ranks[0], knobs)
    return predictor.to(projection.weight(host))


def _predictor_for(
    model: nn.Module, host: nn.Module, config: SparsityConfig, plans: Sequence[BlockPlan]
) -> Predictor | None:
    """An unfitted predictor for one block that may have any of these plans."""
    sparse = [plan for plan in plans if plan.keeps is not None]
    width = max((max(plan.ranks) for plan in sparse), default=None)
    return new_predictor(model, host, config, (sparse or plans)[0], width=width)


def reset_predictors(model: nn.Module, seed: int) -> nn.Module:
    """Initialise token-lowrank predictors randomly, as the authors' code does, in place."""
    generator = torch.Generator().manual_seed(seed)
    for module in sparse_modules(model).values():
        cast(TokenLowrankPredictor, module.predictor).reset_parameters(generator)
    return model


def _grafted(
    model: nn.Module, host: nn.Module, config: SparsityConfig, plan: BlockPlan, predictor: Predictor | None
) -> GraftedAttention:
    if plan.keeps is None or predictor is None:
        return DenseAttention(host, hosts.rotary(model), predictor).train(host.training)
    attention = SparseAttention(host, predictor, sparsity_of(model, config, plan), hosts.rotary(model))
    attention.set_plan(plan)
    return attention.train(host.training)


def sparsity_of(model: nn.Module, config: SparsityConfig, plan: BlockPlan) -> Sparsity:
    """The constants of a block by its plan, which is not dense, at the model's image size."""
    assert plan.keeps is not None
    tile = config.tile if config.granularity == "tile" else ()
    tail, prefix = TAILS[config.tail], hosts.num_prefix_tokens(model)
    return Sparsity(plan.keeps, prefix, tail, hosts.patch_grid(model), plan.cells, tile)


def sparse_block(
    model: nn.Module, host: nn.Module, config: SparsityConfig, plan: BlockPlan, basis: tuple[torch.Tensor, torch.Tensor]
) -> SparseAttention:
    """A trial of a basis: sparse attention over the host's parameters, its head-lowrank predictor not folded."""
    predictor = new_predictor(model, host, config, plan, fold=False)
    assert isinstance(predictor, HeadLowrankPredictor)
    set_basis(host, predictor, *basis)
    return cast(SparseAttention, _grafted(model, host, config, plan, predictor))


@torch.no_grad()
def set_basis(host: nn.Module, predictor: HeadLowrankPredictor, t_q: torch.Tensor, t_k: torch.Tensor) -> None:
    """Set the basis T_q, T_k [H, d, d] of a predictor: folded into the host's projections, else A_q, A_k are its first r
    columns."""
    if predictor.a_q is None or predictor.a_k is None:
        alike = predictor.width > max(predictor.ranks)  # other ranks are to be tried
        projection.fold(host, t_q, t_k, [predictor.width] * len(t_q) if alike else predictor.ranks)
    else:
        predictor.a_q.copy_(t_q[..., : predictor.width])
        predictor.a_k.copy_(t_k[..., : predictor.width])


def freeze_predictors(model: nn.Module) -> nn.Module:
    """Exclude predictors from training, in place: a choice of keys has no gradient, and DistributedDataParallel would wait
    for one."""
    for module in attention_modules(model).values():
        if module.predictor is not None:
            module.predictor.requires_grad_(False)
    return model


def resize(model: nn.Module, img_size: int) -> None:
    """Set another square image size, in place; position embeddings, biases and predictors that depend on N are resampled.

    The number of cells grows as in `SparsityConfig.with_cells`: with the root of N beyond 197 tokens.

    Raises:
        UsageError: see `hosts.set_image_size`; sizes that timm itself cannot use raise timm's own error.
    """
    _follow(model, lambda: hosts.set_image_size(model, img_size, img_size))


class _SetInputSize(ModelMethod):
    """timm's method of a grafted model: its arguments, and everything of `resize`; rectangles too."""

    def __call__(self, *arguments: Any, **named: Any) -> None:
        model = self.model
        _follow(model, lambda: type(model).set_input_size(model, *arguments, **named))


@torch.no_grad()
def _follow(model: nn.Module, change: Callable[[], None]) -> None:
    """Change the image size of the host, and all that depends on it in the grafted attention."""
    old, tokens = hosts.patch_grid(model), hosts.num_tokens(model)
    grafted = attention_modules(model)
    for name, module in grafted.items():  # timm resamples only biases of its own classes
        model.set_submodule(name, module.dense())
    try:
        change()
    finally:
        for name, module in grafted.items():
            module.adopt(model.get_submodule(name))
            model.set_submodule(name, module)
    new = hosts.patch_grid(model)
    if old == new:
        return
    more = growth(hosts.num_tokens(model)) / growth(tokens)
    for module in attention_modules(model).values():
        if isinstance(module, SparseAttention):
            sparsity = module.sparsity
            module.sparsity = dataclasses.replace(sparsity, grid=new, cells=sparsity.cells_for(more))
        if module.predictor is not None:
            module.predictor.resample(old, new)
    for method in methods.of(model).values():
        method.resized(more)


def check_original(dense: nn.Module, sparse: nn.Module) -> None:
    """Check that the two models can be compared.

    Raises:
        UsageError: `dense` is a sparse model, or has another number of classes or another image size.
    """
    if attention_modules(dense):
        raise UsageError("the dense model has sparse attention: give the model that it was converted from")
    for what, one, other in (
        ("classes", cast(Any, dense).num_classes, cast(Any, sparse).num_classes),
        ("patches", hosts.patch_grid(dense), hosts.patch_grid(sparse)),
    ):
        if one != other:
            raise UsageError(f"the dense model has {one} {what}, the sparse one {other}: they cannot be compared")
