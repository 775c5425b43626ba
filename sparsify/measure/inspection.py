"""What a sparse model does with one image, as tensors: keys that queries attend to, remaining tokens, attention kept.

One forward pass of the sparse form by the reference is observed from outside (`sparsify.nn.observe`); nothing is stored on
the model. Token indices of a layer count the P prefix tokens first; patches count row by row from the top left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparsify.config import SparsityConfig
from sparsify.errors import SparsifyError, UsageError
from sparsify.images.photograph import Photograph
from sparsify.nn import attention, execution, graft, hosts, observe, token_models
from sparsify.nn.attention import GraftedAttention, SparseAttention
from sparsify.nn.tokens import TokenState
from sparsify.ops import selection, weights
from sparsify.ops.selection import Context

OWN, DENSE = "own", "dense"  # the model whose attention is the true one

REFERENCES = {
    OWN: "softmax of all q.k of the same layer inside the sparse model, over the tokens present",
    DENSE: "attention of the same layer of the dense original, over all patches",
}
"""What 'true attention' means."""


@dataclass(frozen=True)
class Layer:
    """What the attention of one block does. Weights and shares from 0 to 1; float32 on the CPU; blocks count from 0.

    The true attention is that of `Inspection.reference`; `mass` and `best` are means over the patch rows.
    """

    block: int
    sparse: bool  # whether a predictor selects keys; otherwise all are kept
    budgets: tuple[int, ...]  # b, keys kept by each patch row: of each head
    owner: Tensor  # token that contains each of the n0 patches, counted without prefix, -1 if dropped: int64 [n0]
    rows: Tensor  # token of each query's patch, counted with prefix, -1 if dropped: int64 [Q]
    kept: Tensor  # keys that each query keeps, bool [H, Q, N]; none for dropped queries
    weight: Tensor  # attention that a query gives to each kept key, [H, Q, N]
    tail: Tensor  # attention that it gives to the means of the dropped keys, [H, Q]
    mass: Tensor  # fraction of the true attention that lies on the kept keys, [H]
    best: Tensor  # the highest share that b keys can reach: the keys with the most true attention, [H]

    @property
    def tokens(self) -> int:
        """N, prefix included."""
        return self.kept.shape[-1]


@dataclass(frozen=True)
class Survivors:
    """The patch tokens before and after the stage of a block."""

    block: int  # from 0
    before: int
    after: int
    owner: Tensor  # as `Layer.owner`, after the stage


@dataclass(frozen=True)
class Inspection:
    """One image inside a sparse model."""

    grid: tuple[int, int]  # rows and columns of patches, h*w = n0
    prefix: tuple[str, ...]  # names of the P prefix tokens: cls, dist, reg
    queries: tuple[int, ...]  # Q patches
    heads: int  # H of each block
    depth: int  # number of blocks
    layers: tuple[Layer, ...]  # those whose patch rows are computed, in order
    stages: tuple[Survivors, ...]  # in order; none if all tokens remain
    reference: str  # which attention `mass` is a fraction of, a key of `REFERENCES`

    def layer(self, block: int) -> Layer | None:
        """The layer of a block, counted from 0; None if its patch rows are not computed."""
        return next((layer for layer in self.layers if layer.block == block), None)


@dataclass(frozen=True)
class Shown:
    """One image and what the model does with it."""

    name: str  # of its pictures: the file's stem, with a number if another file has the same
    photo: Photograph
    found: Inspection
    layers: tuple[int, ...]  # whose keys are drawn, from 0
    heads: tuple[int, ...]


class _Call(NamedTuple):
    """A call of a block's attention, as `sparsify.nn.observe.watching_calls` reports it."""

    block: int
    module: GraftedAttention
    q: Tensor  # [1, H, N, d], as k
    k: Tensor
    mask: Tensor | None
    tokens: TokenState | None


class _Map(NamedTuple):
    """What a block of the dense original attends by."""

    q: Tensor  # [1, H, N, d], as k
    k: Tensor
    bias: Tensor | None  # additive mask [1, H, N, N]
    scale: float


@torch.inference_mode()
def inspect(model: nn.Module, x: Tensor, queries: Sequence[int] = (), dense: nn.Module | None = None) -> Inspection:
    """Inspect the preprocessed image x [C, H, W] inside a sparse model in eval mode, which does not change.

    Args:
        queries: patches, 0 to n0 - 1; empty: `default_queries`.
        dense: the dense original; None: `mass` is of the model's own attention.

    Raises:
        SparsifyError: not a sparse model.
        UsageError: a query that is no patch; a dense model that does not fit.
    """
    attention.check_sparse(model)
    grid, prefix = hosts.patch_grid(model), prefix_names(model)
    patches = grid[0] * grid[1]
    queries = tuple(queries) or default_queries(grid)
    if not all(0 <= patch < patches for patch in queries):
        raise UsageError(f"queries {queries}: patches from 0 to {patches - 1} are expected")
    originals = None if dense is None else _dense_maps(dense, x, grid)
    layers: list[Layer] = []
    stages: list[Survivors] = []
    staged = dict(token_models.stages(model))
    present = patches

    def on_call(*call: Any) -> None:
        seen = _Call(*call)
        original = None if originals is None else originals[seen.block]
        layers.append(_layer(seen, len(prefix), patches, queries, original))

    def after_block(block: int, tokens: TokenState | None) -> None:
        nonlocal present
        if block in staged and tokens is not None:
            remaining = present if tokens.place is None else tokens.place.shape[1]
            stages.append(Survivors(block, present, remaining, _owner(tokens, patches)))
            present = remaining

    with execution.sparse_form(model, "reference", "input"), observe.watching_calls(model, on_call, after_block):
        _features(model, x)
    heads = next(iter(attention.attention_modules(model).values())).num_heads
    depth, reference = len(cast(nn.Sequential, model.blocks)), OWN if dense is None else DENSE
    return Inspection(grid, prefix, queries, heads, depth, tuple(layers), tuple(stages), reference)


def default_queries(grid: tuple[int, int]) -> tuple[int, ...]:
    """The patch in the middle, and one near the top left corner, an eighth in from both sides: subject and surroundings."""
    rows, columns = grid
    middle, corner = rows // 2 * columns + columns // 2, rows // 8 * columns + columns // 8
    return tuple(dict.fromkeys((middle, corner)))


def prefix_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the P prefix tokens in order: cls, dist, then registers."""
    names = ["cls"] * (getattr(model, "cls_token", None) is not None) + ["dist"] * hasattr(model, "dist_token")
    return (*names, *["reg"] * (hosts.num_prefix_tokens(model) - len(names)))


def _features(model: nn.Module, x: Tensor) -> None:
    """One forward pass of image x [C, H, W]; models whose tokens are dropped or merged track every patch."""
    weight = next(model.parameters())
    batch = x.unsqueeze(0).to(weight.device, weight.dtype)
    tracking = {"full_grid": True} if hasattr(model, "full_grid") else {}  # of `sparsify.nn.token_models`
    cast(Any, model).forward_features(batch, **tracking)


def _dense_maps(dense: nn.Module, x: Tensor, grid: tuple[int, int]) -> dict[int, _Map]:
    """What each block of the dense model attends by; raises `UsageError` if its patches are not the sparse model's."""
    twin = copy.deepcopy(dense)
    if not attention.attention_modules(twin):
        graft.graft(twin, SparsityConfig(keep="dense"))
    if hosts.patch_grid(twin) != grid:
        raise UsageError(f"the dense model has {hosts.patch_grid(twin)} patches, the sparse one {grid}")
    maps: dict[int, _Map] = {}

    def on_call(*call: Any) -> None:
        block, module, q, k, mask, _ = _Call(*call)
        q, k = q.float(), k.float()
        maps[block] = _Map(q, k, selection.bias_of(mask, q), module.scale)

    with observe.watching_calls(twin, on_call):
        _features(twin, x)
    return maps


def _owner(tokens: TokenState | None, patches: int) -> Tensor:
    """Token of each patch, -1 for dropped ones: int64 [n0]."""
    if tokens is None or tokens.owner is None:
        if tokens is not None and tokens.place is not None:
            raise SparsifyError("tokens were removed and the model did not track where: this is a bug in sparsify")
        return torch.arange(patches)
    return tokens.owner[0].cpu().clone()


def _layer(call: _Call, P: int, patches: int, queries: Sequence[int], original: _Map | None) -> Layer:
    """What a block's attention does; original: of the same block of the dense model; None: true is the block's own."""
    block, module, q, k, mask, tokens = call
    q, k = q.float(), k.float()
    _, H, N, _ = q.shape
    owner = _owner(tokens, patches)
    bias = selection.bias_of(mask, q)
    size, place = (None, None) if tokens is None else (tokens.size, tokens.place)
    at = owner[list(queries)]
    rows = torch.where(at < 0, at, at + P)  # (Q)
    seen = rows.clamp_min(P).to(q.device)
    dropped = (rows < 0)[None, :, None]
    each: dict[str, list[Tensor]] = {name: [] for name in ("kept", "weight", "tail", "mass", "best")}
    budgets = []
    for h, ranked in enumerate(_rankings(module, q, k, mask, tokens, H)):
        one = slice(h, h + 1)
        head_bias = None if bias is None else bias[:, one]
        chosen, a = torch.ones(1, 1, N, N, dtype=torch.bool, device=q.device), None
        budget = N
        if ranked is not None:
            ranking, spec = ranked
            (budget,) = spec.budgets
            context = Context(mask if head_bias is None else head_bias, size, place)
            chosen = selection.kept(ranking, context, spec)  # (1, 1, N, N)
            a, _ = selection.cells(ranking, context, spec)
        row_bias = None if head_bias is None else head_bias[:, :, seen]
        weight, tail = weights.weights(q[:, one, seen], k[:, one], chosen[:, :, seen], a, row_bias, size, module.scale)
        budgets.append(budget)
        each["kept"].append(chosen[0, :, seen])
        each["weight"].append(weight[0])
        each["tail"].append(tail[0])
        if original is None:
            patch_bias = None if head_bias is None else head_bias[:, :, P:]
            true = weights.dense(q[:, one, P:], k[:, one], patch_bias, size, module.scale)
            true, among = true[0, 0], torch.arange(P, N)  # (n, N), their rows in `chosen`
        else:
            true, among = _on_tokens(original, h, owner, P, N)
        each["mass"].append((true * chosen[0, 0, among.to(q.device)]).sum(-1).mean().reshape(1))
        each["best"].append(true.topk(min(budget, N), -1).values.sum(-1).mean().reshape(1))
    kept, weight, tail, mass, best = (torch.cat(parts).cpu() for parts in each.values())
    kept, weight, tail = kept & ~dropped, weight.masked_fill(dropped, 0), tail.masked_fill(dropped[..., 0], 0)
    return Layer(
        block, isinstance(module, SparseAttention), tuple(budgets), owner, rows, kept, weight, tail, mass, best
    )


def _rankings(
    module: GraftedAttention, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None, H: int
) -> Iterable[tuple[selection.Ranking, Any] | None]:
    """How each head ranks its keys, and the constants of the call; None: the head keeps all of them."""
    if not isinstance(module, SparseAttention):
        return [None] * H
    spec = module.spec(q.shape[2], tokens)
    ranking = module.predictor(q, k, mask, tokens, spec).written(q, k)
    return [(ranking.head(h), spec.head(h)) for h in range(H)]


def _on_tokens(original: _Map, h: int, owner: Tensor, P: int, N: int) -> tuple[Tensor, Tensor]:
    """The dense attention of the m remaining patches in head h, summed over the patches of each of N tokens.

    [m, N], without the attention that goes to dropped patches; and the token of each patch, [m].
    """
    q, k, bias, scale = original
    one = slice(h, h + 1)
    remaining = (owner >= 0).nonzero()[:, 0]  # (m)
    rows = (remaining + P).to(q.device)
    full = weights.dense(q[:, one, rows], k[:, one], None if bias is None else bias[:, one, rows], None, scale)[0, 0]
    out = full.new_zeros(len(remaining), N)
    out[:, :P] = full[:, :P]
    into = (owner[remaining] + P).to(q.device)  # (m)
    return out.index_add_(1, into, full[:, rows]), into.cpu()
