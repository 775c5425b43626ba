"""The exchange: the attention of a host model that is understood (`sparsify.nn.hosts`) for the sparse one, and back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from sparsify.config import BlockPlan, SparsityConfig, grid_of, growth
from sparsify.errors import UsageError
from sparsify.nn import projection, token_models
from sparsify.nn.attention import (
    DenseAttention,
    GraftedAttention,
    SparseAttention,
    Sparsity,
    attention_modules,
    sparse_modules,
)
from sparsify.nn.hosts import check, geometry, num_prefix_tokens, num_tokens, patch_grid, rotary, set_image_size, shape
from sparsify.nn.predictor import HeadLowrankPredictor, Predictor, TokenLowrankPredictor
from sparsify.ops.selection import rank_mask
from sparsify.ops.tails import TAILS


def graft(model: nn.Module, config: SparsityConfig, predictors: Sequence[Predictor | None] | None = None) -> nn.Module:
    """Exchange every block's attention for a sparse one (or our dense one), and install the token stages; in place.

    Args:
        predictors: one for each block, None where its attention is dense; None for unfitted ones (`new_predictor`).

    Raises:
        UnsupportedModel: see `check`; nothing is exchanged then.
        UsageError: a list or a rank in `config` that does not fit the model.
    """
    hosts = check(model)
    check_config(model, config)
    plans = config.resolved(geometry(model, hosts))
    if predictors is None:
        predictors = [
            new_predictor(model, host, config, plan) for host, plan in zip(hosts.values(), plans, strict=True)
        ]
    for (name, host), plan, predictor in zip(hosts.items(), plans, predictors, strict=True):
        model.set_submodule(name, _grafted(model, host, config, plan, predictor))
    if config.tokens is not None:
        reduce(model, config)
    return model


def check_config(model: nn.Module, config: SparsityConfig) -> None:
    """Raise `UsageError` where `config` does not fit a dense model that is understood (`hosts.check`)."""
    config.check(*shape(check(model)), num_prefix_tokens(model))
    if config.tokens is not None:
        token_models.check(model)


def reduce(model: nn.Module, config: SparsityConfig) -> None:
    """Install the token stages of `config.tokens` in a model whose attention is grafted, in place. None: no stage.

    A block keeps its fitted importance if its stage uses it; a block that needs one and has none gets zeros.

    Raises:
        UsageError: see `Tokens.check`.
    """
    token_models.remove(model)
    attentions = list(attention_modules(model).values())
    depth = len(attentions)
    if config.tokens is not None:
        config.tokens.check(depth, num_prefix_tokens(model))
    for attention, is_fitted in zip(attentions, fits_importance(config, depth), strict=True):
        if not is_fitted:
            attention.importance = None
        elif attention.importance is None:
            weight = projection.weight(attention)
            attention.importance = weight.new_zeros(projection.channels(attention) + 1)
    if config.tokens is None:
        return
    follow = config.tokens.way == "merge" and any(m.predictor.follows_merging for m in sparse_modules(model).values())
    token_models.install(model, config.tokens.way, config.tokens.shares(depth), follow)


def fits_importance(config: SparsityConfig, depth: int) -> tuple[bool, ...]:
    """For each block, whether it has a stage that uses a fitted importance and keeps some patch tokens."""
    if config.tokens is None or config.tokens.importance != "fitted":
        return (False,) * depth
    return tuple(bool(share) for share in config.tokens.shares(depth))


def apply(model: nn.Module, config: SparsityConfig) -> nn.Module:
    """Set other keeps, cells and token stages in a model with fitted predictors, in place; dense blocks lose theirs.

    Raises:
        UsageError: `config` does not fit, or a block that is dense is to be sparse.
    """
    token_models.remove(model)
    attentions = attention_modules(model)
    plans = config.resolved(geometry(model, attentions))
    for i, ((name, module), plan) in enumerate(zip(attentions.items(), plans, strict=True)):
        if plan.keep is None:
            dense = DenseAttention(module).train(module.training)
            dense.execution = module.execution
            model.set_submodule(name, dense)
        elif isinstance(module, SparseAttention):
            module.sparsity = dataclasses.replace(module.sparsity, keep=plan.keep, cells=plan.cells)
        else:
            raise UsageError(f"block {i + 1} has no predictor: its attention is dense and cannot be made sparse here")
    reduce(model, config)
    return model


def applied(model: nn.Module, config: SparsityConfig) -> nn.Module:
    """A copy that `apply` has changed; it shares every parameter and buffer with `model`."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return apply(copy.deepcopy(model, memo=cast(dict, tensors)), config)


def new_predictor(
    model: nn.Module, host: nn.Module, config: SparsityConfig, plan: BlockPlan, fold: bool | None = None
) -> Predictor | None:
    """An unfitted predictor for one block, dtype and device of the host; None where the plan is dense.

    fold: fold head-lowrank where that is exact; None: as `config.fold`. The projection itself is not touched (`set_basis`).
    """
    if plan.keep is None:
        return None
    heads, head_dim = projection.heads_of(host), projection.head_dim(host)
    predictor: Predictor
    if config.predictor == "head-lowrank":
        fold = (config.fold if fold is None else fold) and projection.foldable(host, rotary(model))
        predictor = HeadLowrankPredictor(head_dim, plan.ranks, fold)
    else:
        knobs = config.token_lowrank.model_dump()
        prefix, tokens = num_prefix_tokens(model), num_tokens(model)
        predictor = TokenLowrankPredictor(heads, head_dim, tokens, prefix, plan.ranks[0], knobs)
    return predictor.to(projection.weight(host))


def draw(model: nn.Module, seed: int) -> nn.Module:
    """Token-lowrank predictors as the authors' code draws them, block after block, in place."""
    generator = torch.Generator().manual_seed(seed)
    for module in sparse_modules(model).values():
        cast(TokenLowrankPredictor, module.predictor).draw(generator)
    return model


def _grafted(
    model: nn.Module, host: nn.Module, config: SparsityConfig, plan: BlockPlan, predictor: Predictor | None
) -> GraftedAttention:
    if plan.keep is None or predictor is None:
        return DenseAttention(host, rotary(model)).train(host.training)
    tile = config.tile if config.granularity == "tile" else ()
    tail, prefix = TAILS[config.tail], num_prefix_tokens(model)
    sparsity = Sparsity(plan.keep, prefix, tail, patch_grid(model), plan.cells, tile)
    return SparseAttention(host, predictor, sparsity, rotary(model)).train(host.training)


def sparse_block(
    model: nn.Module, host: nn.Module, config: SparsityConfig, plan: BlockPlan, basis: tuple[torch.Tensor, torch.Tensor]
) -> SparseAttention:
    """A head-lowrank sparse attention over the host's parameters with a basis of its own, not folded: for trials."""
    predictor = new_predictor(model, host, config, plan, fold=False)
    assert isinstance(predictor, HeadLowrankPredictor)
    set_basis(host, predictor, *basis)
    return cast(SparseAttention, _grafted(model, host, config, plan, predictor))


@torch.no_grad()
def set_basis(host: nn.Module, predictor: HeadLowrankPredictor, t_q: torch.Tensor, t_k: torch.Tensor) -> None:
    """Gives a predictor the basis T_q, T_k [H, d, d]: into the host's projections where it is folded, else its first r
    columns."""
    if predictor.a_q is None or predictor.a_k is None:
        projection.fold(host, t_q, t_k)
    else:
        used = rank_mask(predictor.ranks, predictor.a_q)  # (H, 1, r)
        predictor.a_q.copy_(t_q[..., : used.shape[-1]] * used)
        predictor.a_k.copy_(t_k[..., : used.shape[-1]] * used)


def freeze_predictors(model: nn.Module) -> nn.Module:
    """No gradients for predictors, in place: a choice of keys has none, and DistributedDataParallel would wait for them."""
    for module in sparse_modules(model).values():
        module.predictor.requires_grad_(False)
    return model


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model without sparsity, sharing every parameter and buffer with `model`."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, memo=cast(dict, tensors))
    for name, module in attention_modules(twin).items():
        twin.set_submodule(name, module.dense())
    token_models.remove(twin)
    return twin


@torch.no_grad()
def resize(model: nn.Module, img_size: int) -> None:
    """Another square image size, in place: timm resamples position embeddings and biases, predictors tied to tokens follow.

    The cells grow as `SparsityConfig.with_cells` lets them: in proportion to the root of N beyond 197 tokens.

    Raises:
        UsageError: see `hosts.set_image_size`; a size of which timm itself makes nothing raises timm's own error.
    """
    old, tokens = patch_grid(model), num_tokens(model)
    grafted = attention_modules(model)
    for name, module in grafted.items():  # timm resamples what it finds in its own classes
        model.set_submodule(name, module.dense())
    try:
        set_image_size(model, img_size, img_size)
    finally:
        for name, module in grafted.items():
            module.take(model.get_submodule(name))
            model.set_submodule(name, module)
    new = patch_grid(model)
    for module in sparse_modules(model).values():
        rows, cols = module.sparsity.cells
        cells = (rows, cols) if old == new else grid_of(rows * cols * growth(num_tokens(model)) / growth(tokens))
        module.sparsity = dataclasses.replace(module.sparsity, grid=new, cells=cells)
        module.predictor.resample(old, new)


def foldable(module: GraftedAttention) -> bool:
    """Whether a change of basis of q and k can be folded into the projections exactly."""
    return projection.foldable(module, module.rotary)


def check_original(dense: nn.Module, sparse: nn.Module) -> None:
    """Whether the two can be compared.

    Raises:
        UsageError: `dense` is a sparse model, or has another number of classes or another image size.
    """
    if attention_modules(dense):
        raise UsageError("the dense model has sparse attention: give the model that it was converted from")
    for what, one, other in (
        ("classes", _classes(dense), _classes(sparse)),
        ("patches", patch_grid(dense), patch_grid(sparse)),
    ):
        if one != other:
            raise UsageError(f"the dense model has {one} {what}, the sparse one {other}: they cannot be compared")


def _classes(model: nn.Module) -> int:
    return int(cast(Any, model).num_classes)
