"""Host adapters: which timm models are understood, and the exchange of their attention for the sparse one.

Understood: `Attention` in `Block` or `ResPostBlock` of timm's `VisionTransformer`, exactly these classes. Everything else
is refused by its class name before anything is computed; nothing is skipped in silence.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from timm.layers import Attention, AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from sparsify import ops
from sparsify.config import grid_of, growth
from sparsify.errors import UnsupportedModel, UsageError
from sparsify.nn import fewer
from sparsify.nn.attention import DenseAttention, GraftedAttention, SparseAttention, Sparsity
from sparsify.nn.predictor import HeadLowrank, TokenLowrank
from sparsify.ops import backends, reference
from sparsify.ops.spec import Execution

if TYPE_CHECKING:
    from sparsify.config import SparsityConfig

Predictor = HeadLowrank | TokenLowrank
MODELS = (VisionTransformer, VisionTransformerDistilled)
BLOCKS = (Block, ResPostBlock)
LEFT_DENSE = (AttentionPoolLatent,)  # one query over all tokens: nothing to gain


def check(model: nn.Module, name: str = "") -> dict[str, Attention]:
    """The attention modules that will be exchanged, by module name, in order of the blocks.

    Raises:
        UnsupportedModel: an attention, block or model class that is not understood, named.
    """
    found: dict[str, Attention] = {}
    subject = name or type(model).__name__
    strange = _strange_attention(model)
    if strange:
        raise UnsupportedModel(f"{subject}: attention class {strange} is not understood (see 'sparsify models')")
    if type(model) not in MODELS:
        raise UnsupportedModel(
            f"{subject}: model class {type(model).__name__} is not understood (see 'sparsify models')"
        )
    for i, block in enumerate(cast(nn.Sequential, model.blocks)):
        if type(block) not in BLOCKS:
            raise UnsupportedModel(f"{subject}: block class {type(block).__name__} (blocks.{i}) is not understood")
        found[f"blocks.{i}.attn"] = cast(Attention, block.attn)
    return found


def graft(model: nn.Module, config: SparsityConfig, predictors: Sequence[Predictor | None] | None = None) -> nn.Module:
    """Exchange every block's attention for a sparse one (or our dense one), and let tokens leave; in place.

    Args:
        predictors: one for each block, None where its attention is dense; None for unfitted ones (`new_predictor`).

    Raises:
        UnsupportedModel: see `check`; nothing is exchanged then.
        UsageError: a list or a rank in `config` that does not fit the model.
    """
    hosts = check(model)
    config.check(*shape(hosts), num_prefix_tokens(model))
    config = config.with_cells(num_tokens(model))
    for i, (name, host) in enumerate(hosts.items()):
        predictor = new_predictor(model, host, config, i) if predictors is None else predictors[i]
        model.set_submodule(name, _grafted(model, host, config, i, predictor))
    if config.tokens is not None:
        reduce(model, config)
    return model


def reduce(model: nn.Module, config: SparsityConfig) -> None:
    """Let tokens leave a model whose attention is grafted, as `config.tokens` says; in place. None: all stay.

    Raises:
        UsageError: see `Tokens.check`.
    """
    fewer.remove(model)
    if config.tokens is None:
        return
    depth = len(attention_modules(model))
    config.tokens.check(depth, num_prefix_tokens(model))
    follow = config.tokens.way == "merge" and config.predictor == "token-lowrank"
    fewer.install(model, config.tokens.way, config.tokens.shares(depth), follow)


def apply(model: nn.Module, config: SparsityConfig) -> nn.Module:
    """Other keeps, cells and tokens for a model whose predictors are fitted; in place. Predictors of dense blocks go.

    Raises:
        UsageError: `config` does not fit, or a block that is dense is to be sparse.
    """
    fewer.remove(model)
    config = config.with_cells(num_tokens(model))
    for i, (name, module) in enumerate(attention_modules(model).items()):
        keep = config.keep_of(i)
        if keep is None:
            dense = DenseAttention(cast(Attention, module)).train(module.training)
            dense.execution = module.execution
            model.set_submodule(name, dense)
        elif isinstance(module, SparseAttention):
            module.sparsity = dataclasses.replace(module.sparsity, keep=keep, cells=config.cells_of(i))
        else:
            raise UsageError(f"block {i + 1} has no predictor: its attention is dense and cannot be made sparse here")
    reduce(model, config)
    return model


def applied(model: nn.Module, config: SparsityConfig) -> nn.Module:
    """A copy that `apply` has changed; it shares every parameter and buffer with `model`."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return apply(copy.deepcopy(model, memo=cast(dict, tensors)), config)


def new_predictor(model: nn.Module, host: Attention, config: SparsityConfig, block: int) -> Predictor | None:
    """An unfitted predictor for one block, dtype and device of the host; None where the block stays dense.

    With `config.fold`, head-lowrank is folded where nothing stands between the projection and the product; `qkv` itself
    is not touched (`fold`).
    """
    if config.keep_of(block) is None:
        return None
    ranks = config.ranks_of(block, host.num_heads)
    predictor: Predictor
    if config.predictor == "head-lowrank":
        predictor = HeadLowrank(host.head_dim, ranks, config.fold and foldable(host))
    else:
        knobs = config.token_lowrank.model_dump()
        prefix, tokens = num_prefix_tokens(model), num_tokens(model)
        predictor = TokenLowrank(host.num_heads, host.head_dim, tokens, prefix, ranks[0], knobs)
    return predictor.to(host.qkv.weight)


def draw(model: nn.Module, seed: int) -> nn.Module:
    """Token-lowrank predictors as the authors' code draws them, block after block, in place."""
    generator = torch.Generator().manual_seed(seed)
    for module in sparse_modules(model).values():
        cast(TokenLowrank, module.predictor).draw(generator)
    return model


def _grafted(
    model: nn.Module, host: Attention, config: SparsityConfig, block: int, predictor: Predictor | None
) -> GraftedAttention:
    keep = config.keep_of(block)
    if keep is None or predictor is None:
        return DenseAttention(host).train(host.training)
    tile = config.tile if config.granularity == "tile" else ()
    sparsity = Sparsity(keep, num_prefix_tokens(model), config.tail, patch_grid(model), config.cells_of(block), tile)
    return SparseAttention(host, predictor, sparsity).train(host.training)


def sparse_block(
    model: nn.Module, host: Attention, config: SparsityConfig, block: int, basis: tuple[torch.Tensor, torch.Tensor]
) -> SparseAttention:
    """A head-lowrank sparse attention over the host's parameters with a basis of its own, not folded: for trials."""
    predictor = new_predictor(model, host, config.model_copy(update={"fold": False}), block)
    assert isinstance(predictor, HeadLowrank)
    set_basis(host.qkv, predictor, *basis)
    return cast(SparseAttention, _grafted(model, host, config, block, predictor))


@torch.no_grad()
def set_basis(qkv: nn.Linear, predictor: HeadLowrank, t_q: torch.Tensor, t_k: torch.Tensor) -> None:
    """Gives a predictor the basis T_q, T_k [H, d, d]: into `qkv` where it is folded, else its first r columns."""
    if predictor.a_q is None or predictor.a_k is None:
        fold(qkv, t_q.to(qkv.weight.device), t_k.to(qkv.weight.device))
    else:
        used = reference.rank_mask(predictor.ranks, predictor.a_q)  # (H, 1, r)
        predictor.a_q.copy_(t_q[..., : used.shape[-1]] * used)
        predictor.a_k.copy_(t_k[..., : used.shape[-1]] * used)


def sparse_modules(model: nn.Module) -> dict[str, SparseAttention]:
    """The sparse attention modules of a model, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseAttention)}


def attention_modules(model: nn.Module) -> dict[str, GraftedAttention]:
    """The grafted attention modules of a model, sparse and dense, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GraftedAttention)}


def freeze_predictors(model: nn.Module) -> nn.Module:
    """No gradients for predictors, in place: a choice of keys has none, and DistributedDataParallel would wait for them."""
    for module in sparse_modules(model).values():
        module.predictor.requires_grad_(False)
    return model


def set_execution(model: nn.Module, execution: Execution) -> None:
    """How all sparse attention of `model` is computed, in place; the device and dtype of its weights are looked at.

    Raises:
        UsageError: an unknown backend or precision; backend cpu where the kernels cannot be used.
    """
    weight = next(model.parameters())
    check_execution(execution, weight.device, weight.dtype)
    for module in attention_modules(model).values():
        module.execution = execution


def check_execution(execution: Execution, device: torch.device, dtype: torch.dtype) -> None:
    """Raise as `set_execution` does, for a model that would be there; change nothing."""
    for what, given, known in (
        ("backend", execution.backend, ops.BACKENDS),
        ("kernel precision", execution.precision, ops.PRECISIONS),
    ):
        if given not in known:
            raise UsageError(f"{what} '{given}': expected one of {', '.join(known)}")
    if execution.backend == "cpu" and (reason := backends.unavailable(device, dtype)):
        raise UsageError(f"backend 'cpu' cannot be used here: {reason}; 'auto' or 'reference' needs no kernels")


@contextlib.contextmanager
def sparse_form(model: nn.Module, backend: str | None = None, precision: str | None = None) -> Iterator[None]:
    """Inside the block all attention computes the sparse form: no dense fallback. Afterwards all is as it was.

    Args:
        backend, precision: of `Execution`; None: the model's own.

    Raises:
        UsageError: see `set_execution`.
    """
    modules = list(attention_modules(model).values())
    before = [module.execution for module in modules]
    try:
        for module, own in zip(modules, before, strict=True):
            sparse = Execution(own.backend if backend is None else backend, precision or own.precision)
            set_execution(module, sparse)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.execution = own


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model without sparsity, sharing every parameter and buffer with `model`."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, memo=cast(dict, tensors))
    for name, module in attention_modules(twin).items():
        twin.set_submodule(name, module.dense())
    fewer.remove(twin)
    return twin


@torch.no_grad()
def resize(model: nn.Module, img_size: int) -> None:
    """Another square image size, in place: timm resamples the position embedding, predictors tied to tokens follow.

    The cells grow as `SparsityConfig.with_cells` lets them: in proportion to the root of N beyond 197 tokens.
    """
    old, tokens = patch_grid(model), num_tokens(model)
    cast(VisionTransformer, model).set_input_size(img_size=(img_size, img_size))
    new = patch_grid(model)
    for module in sparse_modules(model).values():
        rows, cols = module.sparsity.cells
        cells = (rows, cols) if old == new else grid_of(rows * cols * growth(num_tokens(model)) / growth(tokens))
        module.sparsity = dataclasses.replace(module.sparsity, grid=new, cells=cells)
        if isinstance(module.predictor, TokenLowrank):
            module.predictor.resample(old, new)


def foldable(host: Attention) -> bool:
    """Whether a change of basis of q and k can be folded into `qkv` exactly."""
    return isinstance(host.q_norm, nn.Identity) and isinstance(host.k_norm, nn.Identity)


@torch.no_grad()
def fold(qkv: nn.Linear, t_q: torch.Tensor, t_k: torch.Tensor) -> None:
    """Change the basis of every head: q <- T_q' q, k <- T_k' k, in the rows and biases of `qkv`; in place.

    Args:
        t_q, t_k: [H, d, d] with T_q T_k' = I, so that q.k stays the same; float64 keeps that to rounding.
    """
    H, d, _ = t_q.shape
    weight = qkv.weight.double().reshape(3, H, d, -1)
    weight = torch.stack([t_q.mT.double() @ weight[0], t_k.mT.double() @ weight[1], weight[2]])  # (3, H, d, C)
    qkv.weight.copy_(weight.reshape_as(qkv.weight))
    if qkv.bias is not None:
        bias = qkv.bias.double().reshape(3, H, d, 1)
        bias = torch.stack([t_q.mT.double() @ bias[0], t_k.mT.double() @ bias[1], bias[2]])
        qkv.bias.copy_(bias.reshape_as(qkv.bias))


def shape(hosts: Mapping[str, Attention]) -> tuple[int, int, int]:
    """Blocks, heads of a block, and size of a head (the smallest of all blocks)."""
    attentions = list(hosts.values())
    return len(attentions), attentions[0].num_heads, min(host.head_dim for host in attentions)


def num_prefix_tokens(model: nn.Module) -> int:
    """P: cls, distillation and register tokens."""
    return int(cast(int, model.num_prefix_tokens))


def patch_grid(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches at the model's own image size."""
    h, w = cast(VisionTransformer, model).patch_embed.grid_size
    return int(h), int(w)


def num_tokens(model: nn.Module) -> int:
    """N, prefix tokens included, at the model's own image size."""
    h, w = patch_grid(model)
    return num_prefix_tokens(model) + h * w


def _strange_attention(model: nn.Module) -> str:
    """Class name (and place) of the first attention module that is not understood; '' where there is none."""
    inside = tuple(name + "." for name, module in model.named_modules() if isinstance(module, LEFT_DENSE))
    for name, module in model.named_modules():
        if type(module) is Attention or isinstance(module, LEFT_DENSE) or name.startswith(inside):
            continue
        if re.search(r"attn|attention|msa$", type(module).__name__, re.IGNORECASE) and any(module.children()):
            return f"{type(module).__name__} ({name})" if name else type(module).__name__
    return ""
