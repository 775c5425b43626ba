"""What a sparse model does with one image, as tensors: keys that queries attend to, tokens that go on, attention kept.

Nothing is stored on the model: one forward pass is looked at from outside (`sparsify.nn.observe`), in the sparse form and
by the reference. Tokens of a layer are counted with the P prefix tokens first; patches row by row from the top left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify.config import SparsityConfig
from sparsify.errors import SparsifyError, UsageError
from sparsify.images.photograph import Photograph
from sparsify.nn import attention, execution, graft, hosts, observe, token_models
from sparsify.nn.attention import GraftedAttention, SparseAttention
from sparsify.nn.tokens import TokenState
from sparsify.ops import selection, weights

OWN, DENSE = "own", "dense"  # whose attention the kept share is of

REFERENCES = {
    OWN: "softmax of all q.k of the same layer inside the sparse model, over the tokens present",
    DENSE: "attention of the same layer of the dense original, over all patches",
}
"""What 'true attention' means, in words."""


@dataclass(frozen=True)
class Layer:
    """What the attention of one block does. Weights and shares from 0 to 1; float32 on the CPU.

    Attributes:
        block: counted from 0.
        sparse: whether a predictor chooses keys; otherwise all are kept.
        budget: b, keys kept by each patch row.
        owner: token that each of the n0 patches is in, counted without prefix, -1 where it has left: int64 [n0].
        rows: token of each query's patch, counted with prefix, -1 where it has left: int64 [Q].
        kept: keys that each query keeps, bool [H, Q, N]; none where the query has left.
        weight: what it gives them, [H, Q, N]; tail: what it gives to the means of the others, [H, Q].
        mass: share of the true attention that lies on the kept keys, mean over the patch rows, [H].
        best: the same for the b keys with the most true attention, the highest that any choice could reach, [H].
    """

    block: int
    sparse: bool
    budget: int
    owner: Tensor
    rows: Tensor
    kept: Tensor
    weight: Tensor
    tail: Tensor
    mass: Tensor
    best: Tensor

    @property
    def tokens(self) -> int:
        """N, prefix included."""
        return self.kept.shape[-1]


@dataclass(frozen=True)
class Survivors:
    """The tokens that go on behind the stage of a block.

    Attributes:
        block: counted from 0.
        before, after: patch tokens.
        owner: as `Layer.owner`, behind the stage.
    """

    block: int
    before: int
    after: int
    owner: Tensor


@dataclass(frozen=True)
class Inspection:
    """One image inside a sparse model.

    Attributes:
        grid: rows and columns of patches, h*w = n0.
        prefix: names of the P prefix tokens: cls, dist, reg.
        queries: patches looked at, Q of them.
        heads, depth: H of each block, and how many blocks there are.
        layers: those whose patch rows are computed, in order.
        stages: in order; none where all tokens stay.
        reference: whose attention `mass` is of, a key of `REFERENCES`.
    """

    grid: tuple[int, int]
    prefix: tuple[str, ...]
    queries: tuple[int, ...]
    heads: int
    depth: int
    layers: tuple[Layer, ...]
    stages: tuple[Survivors, ...]
    reference: str

    def layer(self, block: int) -> Layer | None:
        """That of a block, counted from 0; None: its patch rows are not computed."""
        return next((layer for layer in self.layers if layer.block == block), None)


@torch.inference_mode()
def inspect(model: nn.Module, x: Tensor, queries: Sequence[int] = (), dense: nn.Module | None = None) -> Inspection:
    """Look at one image inside a sparse model.

    Args:
        model: a timm model with sparse attention, eval mode; it is left as it is.
        x: the image as the model takes it, [C, H, W].
        queries: patches, 0 to n0 - 1; none: `default_queries`.
        dense: the dense original; None: `mass` is of the model's own attention.

    Raises:
        SparsifyError: not a sparse model.
        UsageError: a query that is no patch; a dense model that does not fit.
    """
    check(model)
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

    def witness(
        block: int, module: GraftedAttention, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None
    ) -> None:
        original = None if originals is None else originals[block]
        layers.append(_layer(block, module, q, k, mask, tokens, len(prefix), patches, queries, original))

    def stepped(block: int, tokens: TokenState | None) -> None:
        nonlocal present
        if block in staged and tokens is not None:
            left = present if tokens.place is None else tokens.place.shape[1]
            stages.append(Survivors(block, present, left, _owner(tokens, patches)))
            present = left

    with execution.sparse_form(model, "reference", "input"), observe.attending(model, witness, stepped):
        _features(model, x)
    heads = next(iter(attention.attention_modules(model).values())).num_heads
    return Inspection(
        grid, prefix, queries, heads, len(cast(nn.Sequential, model.blocks)), tuple(layers), tuple(stages),
        OWN if dense is None else DENSE,
    )  # fmt: skip


def check(model: nn.Module) -> None:
    """Raise `SparsifyError` where there is nothing to look at."""
    if not attention.attention_modules(model):
        raise SparsifyError("this model has no sparse attention: convert it first")


def default_queries(grid: tuple[int, int]) -> tuple[int, ...]:
    """The patch in the middle, and one near the top left corner, an eighth in from both sides: subject and surroundings."""
    rows, columns = grid
    middle, corner = rows // 2 * columns + columns // 2, rows // 8 * columns + columns // 8
    return tuple(dict.fromkeys((middle, corner)))


def prefix_names(model: nn.Module) -> tuple[str, ...]:
    """What the P prefix tokens are, in their order: cls, dist, then registers."""
    names = ["cls"] * (getattr(model, "cls_token", None) is not None) + ["dist"] * hasattr(model, "dist_token")
    return (*names, *["reg"] * (hosts.num_prefix_tokens(model) - len(names)))


def _features(model: nn.Module, x: Tensor) -> None:
    """One forward pass of image x [C, H, W], which follows where every patch goes."""
    weight = next(model.parameters())
    batch = x.unsqueeze(0).to(weight.device, weight.dtype)
    host = cast(Any, model)
    leave = hasattr(model, "full_grid")  # of `sparsify.nn.token_models`: the model can follow where every patch goes
    host.forward_features(batch, full_grid=True) if leave else host.forward_features(batch)


Map = tuple[Tensor, Tensor, Tensor | None, float]
"""q, k [1, H, N, d], additive mask [1, H, N, N] or None, and scale, of one block of the dense original."""


def _dense_maps(dense: nn.Module, x: Tensor, grid: tuple[int, int]) -> dict[int, Map]:
    """What each block of the dense model attends by."""
    twin = copy.deepcopy(dense)
    if not attention.attention_modules(twin):
        graft.graft(twin, SparsityConfig(keep="dense"))
    if hosts.patch_grid(twin) != grid:
        raise UsageError(f"the dense model has {hosts.patch_grid(twin)} patches, the sparse one {grid}")
    found: dict[int, Map] = {}

    def witness(
        block: int, module: GraftedAttention, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None
    ) -> None:
        q, k = q.float(), k.float()
        found[block] = (q, k, weights.additive(mask, q, q.shape[2]), module.scale)

    with observe.attending(twin, witness):
        _features(twin, x)
    return found


def _owner(tokens: TokenState | None, patches: int) -> Tensor:
    """Token of each patch, -1 where it has left: int64 [n0]."""
    if tokens is None or tokens.owner is None:
        if tokens is not None and tokens.place is not None:
            raise SparsifyError("tokens have left and the model did not follow where: this is a bug in sparsify")
        return torch.arange(patches)
    return tokens.owner[0].cpu().clone()


def _layer(
    block: int, module: GraftedAttention, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None, P: int,
    patches: int, queries: Sequence[int], original: Map | None,
) -> Layer:  # fmt: skip
    q, k = q.float(), k.float()
    _, H, N, _ = q.shape
    owner = _owner(tokens, patches)
    bias = weights.additive(mask, q, N)
    size, place = (None, None) if tokens is None else (tokens.size, tokens.place)
    at = owner[list(queries)]
    rows = torch.where(at < 0, at, at + P)  # (Q)
    seen = rows.clamp_min(P).to(q.device)
    gone = (rows < 0)[None, :, None]
    each: dict[str, list[Tensor]] = {name: [] for name in ("kept", "weight", "tail", "mass", "best")}
    budget = N
    for h, ranked in enumerate(_rankings(module, q, k, mask, tokens, H)):
        one = slice(h, h + 1)
        own = None if bias is None else bias[:, one]
        a = None
        if ranked is None:
            chosen = torch.ones(1, 1, N, N, dtype=torch.bool, device=q.device)
        else:
            ranking, spec = ranked
            budget = spec.budget
            chosen = selection.kept(ranking, mask if own is None else own, spec, place)  # (1, 1, N, N)
            a = selection.cells(ranking, mask if own is None else own, size, spec, place)
        asked = None if own is None else own[:, :, seen]
        weight, tail = weights.weights(q[:, one, seen], k[:, one], chosen[:, :, seen], a, asked, size, module.scale)
        each["kept"].append(chosen[0, :, seen])
        each["weight"].append(weight[0])
        each["tail"].append(tail[0])
        if original is None:
            true = weights.dense(q[:, one, P:], k[:, one], None if own is None else own[:, :, P:], size, module.scale)
            true, among = true[0, 0], torch.arange(P, N)  # (n, N), their rows in `chosen`
        else:
            true, among = _on_tokens(original, h, owner, P, N)
        each["mass"].append((true * chosen[0, 0, among.to(q.device)]).sum(-1).mean().reshape(1))
        each["best"].append(true.topk(min(budget, N), -1).values.sum(-1).mean().reshape(1))
    kept, weight, tail, mass, best = (torch.cat(parts).cpu() for parts in each.values())
    return Layer(
        block, isinstance(module, SparseAttention), budget, owner, rows, kept & ~gone, weight.masked_fill(gone, 0),
        tail.masked_fill(gone[..., 0], 0), mass, best,
    )  # fmt: skip


def _rankings(
    module: GraftedAttention, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None, H: int
) -> Iterable[tuple[selection.Ranking, Any] | None]:
    """How each head ranks its keys, and the constants of the call; None: it keeps them all."""
    if not isinstance(module, SparseAttention):
        return [None] * H
    spec = module.spec(q.shape[2], tokens)
    ranking = module.predictor.ranking(q, k, mask, tokens, module.scale, spec)
    return [(ranking.head(h), spec) for h in range(H)]


def _on_tokens(original: Map, h: int, owner: Tensor, P: int, N: int) -> tuple[Tensor, Tensor]:
    """The dense attention of the patches still present, summed over the patches of each of N tokens.

    Returns:
        [m, N] for m patches (what went to patches that have left is on no token), and the tokens they are in, [m].
    """
    q, k, bias, scale = original
    one = slice(h, h + 1)
    there = (owner >= 0).nonzero()[:, 0]  # (m)
    rows = (there + P).to(q.device)
    full = weights.dense(q[:, one, rows], k[:, one], None if bias is None else bias[:, one, rows], None, scale)[0, 0]
    out = full.new_zeros(len(there), N)
    out[:, :P] = full[:, :P]
    into = (owner[there] + P).to(q.device)  # (m)
    return out.index_add_(1, into, full[:, rows]), into.cpu()


@dataclass(frozen=True)
class Shown:
    """One image and what the model does with it.

    Attributes:
        name: of its pictures: the file's stem, with a number where two files have the same.
        layers, heads: to draw the keys of, counted from 0.
    """

    name: str
    photo: Photograph
    found: Inspection
    layers: tuple[int, ...]
    heads: tuple[int, ...]
