"""Attention that replaces a host's: same parameters, same names. Sparse with a `predictor`, or dense.

Unlike timm's, both support removed and merged tokens (`sparsify.nn.tokens`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import sparsify.ops.macs  # noqa: F401 (registers what torch's FlopCounterMode counts)
from sparsify.config import BlockPlan, grid_of, growth
from sparsify.errors import SparsifyError
from sparsify.nn import projection
from sparsify.nn.predictor import Predictor
from sparsify.nn.tokens import TokenState
from sparsify.ops import attention, auto, backends, tails
from sparsify.ops.auto import Choice, Chooser
from sparsify.ops.selection import Context, cells_of
from sparsify.ops.spec import Grid, Kind, Shape, Spec, budget, shortest

NO_KIND, NO_SPEC = Kind("dense", 0, 0), Spec((), 0, "none", (0, 0), ())  # of the shape of a dense call


@dataclass(frozen=True)
class Execution:
    """How an attention module computes; plain configuration, no part of the model's file or state dict.

    Dense attention may replace the sparse form only in models whose weights are the dense original's; never in training, nor
    where a gradient is needed, nor once the model or a copy of it has been in train mode (`Chooser.withdraw`).
    """

    backend: str = "auto"  # auto, cpu or reference (`sparsify.ops.backends`)
    precision: str = "input"  # input, or bf16: the kernels store q, k, v of float32 models in bfloat16
    dense_fallback: bool = False  # dense attention may replace the sparse form where `choose` measured it faster
    choose: Chooser | None = None  # measures and remembers; None: no dense fallback
    graph: bool = False  # the model is replayed from CUDA graphs, and so are the calls that `choose` times


@dataclass(frozen=True)
class Sparsity:
    """Constants of one block's sparse attention; terms as in `sparsify.config.SparsityConfig`."""

    keeps: tuple[float, ...]  # of each head, or one for all
    prefix: int
    tail: tails.Tail
    grid: Grid
    cells: tuple[Grid, ...]  # of each head, or one for all
    tile: tuple[int, ...] = ()  # empty: one key set for each query

    def cells_of(self, N: int) -> tuple[Grid, ...]:
        """Grids of cells for N tokens: fewer where tokens were removed, by the rule of `SparsityConfig.with_cells`."""
        all_tokens = self.prefix + self.grid[0] * self.grid[1]
        return self.cells if all_tokens <= N else self.cells_for(growth(N) / growth(all_tokens))

    def cells_for(self, factor: float) -> tuple[Grid, ...]:
        """Grids of cells with about `factor` times as many."""
        return tuple(grid_of(rows * columns * factor) for rows, columns in self.cells)


class GraftedAttention(nn.Module):
    """The frame of timm's attention classes: q, k, v of x; attention; output projection. Subclasses define `attend`.

    Shares all parameters, buffers, submodules and constants of the host, so state dict keys stay timm's.
    `sparsify.nn.projection` handles the differences between hosts.

    Args:
        host: of a class of `projection.SUPPORTED`, or a grafted attention, whose execution is copied.
        rotary: the host's model passes a rotary embedding.

    Attributes:
        execution: backend, precision and dense fallback; set by `execution.set_execution`.
        watch: called with q, k, v of every pass; set by `observe.watching` while it lasts.
        importance: w and b of the fitted importance, [C + 1], a buffer; None: importance by attention
            (`sparsify.nn.importance`).
        predictor: what ranks the keys; of dense attention None, or that of a schedule which is not in use
            (`sparsify.nn.schedules`).
    """

    proj: nn.Linear
    attn_drop: nn.Dropout
    importance: Tensor | None
    predictor: Predictor | None
    ADDED = ("predictor", "sparsity", "execution", "watch", "host_class", "rotary")  # attributes that no host has

    def __init__(self, host: nn.Module, rotary: bool = False) -> None:
        super().__init__()
        self.host_class: type[nn.Module] = type(host)
        self.rotary, self.execution = rotary, Execution()
        if isinstance(host, GraftedAttention):
            self.host_class, self.rotary, self.execution = host.host_class, host.rotary, host.execution
        self.watch: Callable[[Tensor, Tensor, Tensor], None] | None = None
        self.register_buffer("importance", None)
        self.adopt(host)
        self.num_heads, self.head_dim = projection.heads_of(host), projection.head_dim(host)
        self.scale = self.head_dim**-0.5  # scaled_dot_product_attention's, which the host uses

    def adopt(self, host: nn.Module) -> None:
        """Share everything the host has; called again after timm changed the host (another image size)."""
        _share(host, self, self.ADDED)

    def dense(self) -> nn.Module:
        """The host again: timm's own class over the same parameters."""
        host = self.host_class.__new__(self.host_class)
        nn.Module.__init__(host)
        _share(self, host, (*self.ADDED, "importance"))
        return host.train(self.training)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, C] -> [B, N, C]; the arguments are those of all hosts together.

        Args:
            attn_mask: bool (True: may attend) or additive, broadcastable to [B, H, N, N].
            rope: see `projection.heads`.
            shared_rel_pos_bias: added to the logits besides the module's own bias, [1, H, N, N].
        """
        if is_causal:
            attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        bias = projection.position_bias(self, shared_rel_pos_bias)
        q, k, v = self.qkv_heads(x, rope)  # (B, H, N, d) each
        out = self.attend(q, k, v, joined(attn_mask, bias), None)  # (B, N, H*d)
        return self.close(out, x)

    def qkv_heads(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B, N, C] after norms and rotation: [B, H, N, d] each, one dtype."""
        if rope is not None and not self.rotary:
            raise ValueError("this attention was grafted for a model without rotary embedding: it takes none")
        q, k, v = projection.heads(self, x, rope)
        if self.watch is not None:
            self.watch(q, k, v)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: TokenState | None) -> Tensor:
        """[B, H, N, d] x 3 -> [B, N, H*d]. tokens: None where all tokens are present."""
        raise NotImplementedError

    def close(self, out: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and projection of out [B, N, H*d] for the input rows x [B, N, C]: [B, N, C]."""
        return projection.close(self, out, x)

    def prefix_rows(
        self, x: Tensor, prefix: int, tokens: TokenState, rope: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Only the rows of the P prefix tokens, which attend to all keys: x [B, N, C] -> [B, P, C]; bias [B, H, N, N]."""
        self._refuse_dropout()
        q, k, v = projection.heads(self, x, rope, prefix)
        bias = None if bias is None else bias[:, :, :prefix]
        out = attention.dense("sdpa", q, k, v, bias, self.scale, "input", tokens.size)
        return self.close(out, x[:, :prefix])

    def _refuse_dropout(self) -> None:
        if self.training and self.attn_drop.p > 0:
            raise NotImplementedError("attention dropout is not defined for grafted attention: set attn_drop_rate=0")


def joined(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A mask (bool or additive) and a bias of the logits as one mask."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def _share(source: nn.Module, target: nn.Module, exclude: tuple[str, ...]) -> None:
    """Register the parameters, buffers, submodules and constants of `source` in `target`, under the same names."""
    for kind in ("_parameters", "_buffers", "_modules"):
        getattr(target, kind).update({k: v for k, v in getattr(source, kind).items() if k not in exclude})
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set
    plain = {k: v for k, v in source.__dict__.items() if not k.startswith("_") and k not in (*exclude, "training")}
    target.__dict__.update(plain)


class DenseAttention(GraftedAttention):
    """Every query attends to every token that is present; `predictor` rests."""

    def __init__(self, host: nn.Module, rotary: bool = False, predictor: Predictor | None = None) -> None:
        super().__init__(host, rotary)
        self.predictor = predictor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: TokenState | None) -> Tensor:
        self._refuse_dropout()
        size = None if tokens is None else tokens.size
        path = "sdpa" if backends.needs_grad(q, k, v) else self.path(q, mask, tokens)
        return attention.dense(path, q, k, v, mask, self.scale, self.execution.precision, size)

    def path(self, q: Tensor, mask: Tensor | None, tokens: TokenState | None = None) -> str:
        """What computes a call without gradients, one of `auto.DENSE`: our kernel where it is available, else torch's; on a
        GPU the one that `auto` measured fastest."""
        e = self.execution
        if q.device.type == "cuda":
            if e.choose is None or self.training or not backends.eager(q):
                return "sdpa"
            B, H, N, d = q.shape
            shape = Shape(B, H, N, d, q.dtype, str(q.device), 0, mask is not None, e.precision, "", NO_KIND, NO_SPEC)
            return e.choose.choose(
                shape._replace(merged=tokens is not None and tokens.size is not None, graph=e.graph), None
            ).taken
        runs_here = backends.eager(q) or backends.compiling()
        kernel = runs_here and backends.resolve(e.backend, q, mask) == "cpu"
        return "dense-cpu" if kernel else "sdpa"

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}"


class SparseAttention(GraftedAttention):
    """Every query attends to its b highest-ranked keys; a tail represents the others (equations 1 to 3 of docs/design.md).

        q, k, v  = the host's projections of x                                              [B, H, N, d] each
        score_ij = row_i . col_j, the predictor's; for head-lowrank (q_i A_q) . (k_j A_k)   [B, H, N, N]            (2)
        S_i      = the b = ceil(keep N) keys with the highest score_ij; all keys for prefix rows                    (1)
        out_i    = ( sum_{j in S_i} e^{s_ij} v_j + sum_c m_ic e^{s_ic} vbar_c )
                   / (the same sums without values)                                         [B, N, H*d]             (3)
        X'       = proj(out)                                                                [B, N, C]

    s_ij = q_i . k_j / sqrt(d) is computed for kept pairs only. c runs over the tail's cells of keys: m_ic keys of c were
    dropped by row i; s_ic = q_i . kbar_c / sqrt(d); kbar_c and vbar_c are the mean key and value of the cell.

    Args:
        host, rotary: see `GraftedAttention`.
        predictor: see `sparsify.nn.predictor`.
        sparsity: keep, prefix tokens, tail.
    """

    predictor: Predictor

    def __init__(self, host: nn.Module, predictor: Predictor, sparsity: Sparsity, rotary: bool = False) -> None:
        super().__init__(host, rotary)
        self.sparsity = sparsity
        self.predictor = predictor

    def train(self, mode: bool = True) -> SparseAttention:
        """As torch's, and ends the dense fallback for this model and its copies (an average of weights, a teacher):
        trained weights are no longer the dense model's."""
        if mode and self.execution.choose is not None:
            self.execution.choose.withdraw()
        super().train(mode)
        return self

    def set_plan(self, plan: BlockPlan) -> None:
        """Set keeps, cells and, where the predictor can have others, ranks of each head; plan: not dense."""
        assert plan.keeps is not None
        self.sparsity = replace(self.sparsity, keeps=plan.keeps, cells=plan.cells)
        self.predictor.set_ranks(plan.ranks)

    def with_plan(self, plan: BlockPlan) -> SparseAttention:
        """The same attention by another plan, over the same parameters."""
        other = SparseAttention(self, copy.copy(self.predictor), self.sparsity)
        other.set_plan(plan)
        return other.train(self.training)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: TokenState | None) -> Tensor:
        """[B, H, N, d] x 3 -> [B, N, H*d], by the path that `execution` selects."""
        self._refuse_dropout()
        spec = self.spec(q.shape[2], tokens)
        learns = torch.is_grad_enabled()  # asked once: a look at all parameters takes 2 us
        if learns and backends.needs_grad(q, k, v):
            path = backends.training(self.execution.backend, q, mask)
        elif learns and backends.needs_grad(*self.predictor.parameters()):
            # only the predictor could learn, and a choice of keys has no gradient: the op's backward gives None
            path = "reference"
        else:
            path, _ = self.path(q, mask, tokens, spec)
        if path in auto.DENSE:
            size = None if tokens is None else tokens.size
            return attention.dense(path, q, k, v, mask, self.scale, self.execution.precision, size)
        return self.sparse(q, k, v, mask, tokens, spec, path)

    def sparse(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: TokenState | None, spec: Spec, backend: str
    ) -> Tensor:
        """The sparse form: the predictor ranks the keys, the op attends to the b highest and to the tail.

        [B, H, N, d] x 3 -> [B, N, H*d]; backend: cpu, masked or reference.
        """
        size, place = (None, None) if tokens is None else (tokens.size, tokens.place)
        ranking, context = self.predictor(q, k, mask, tokens, spec), Context(mask, size, place)
        tail = self.sparsity.tail
        if not tail.stands_for_dropped_keys:
            spec = spec._replace(tail="none")
        elif not tails.known(tail):
            cell, count = cells_of(tail, ranking.written(q, k), context, spec)
            context = context._replace(cell=cell)
            spec = spec._replace(tail=tails.ASSIGNED, cells=((1, count - min(spec.prefix, q.shape[2])),))
        return attention.attention(q, k, v, ranking, context, spec, backend, self.execution.precision)

    def path(self, q: Tensor, mask: Tensor | None, tokens: TokenState | None, spec: Spec) -> tuple[str, Choice | None]:
        """What computes a call without gradients, and the decision of `auto` if it was asked: cpu, masked or reference, the
        sparse form; or one of `auto.DENSE`, if allowed and measured faster."""
        e = self.execution
        path = backends.resolve(e.backend, q, mask)
        may_be_dense = e.dense_fallback and e.choose is not None and not self.training and backends.eager(q)
        if not may_be_dense or e.choose is None or e.choose.withdrawn:
            return path, None
        choice = e.choose.choose(self.shape(q, mask, path, spec, tokens), partial(self._timed, spec=spec, backend=path))
        return choice.taken, choice

    def _timed(self, q: Tensor, k: Tensor, v: Tensor, context: Context, spec: Spec, backend: str) -> Tensor:
        """The sparse form as `auto` times it. Nobody tracks owners there: token-lowrank takes the columns of the remaining
        patches instead of the sums over merged ones, which costs a little less."""
        tokens = None
        if context.size is not None or context.place is not None:
            tokens = TokenState(spec.grid[0] * spec.grid[1], context.size, context.place)
        return self.sparse(q, k, v, context.mask, tokens, spec, backend)

    def spec(self, N: int, tokens: TokenState | None = None) -> Spec:
        """The constants of a call with N tokens; fewer cells where tokens were removed."""
        if tokens is None or tokens.place is None:
            return self.spec_of(self.sparsity, N, False)
        spec = self.spec_of(self.sparsity, N, True)  # places are on the grid of this image, which may have another size
        return spec._replace(grid=tails.patch_grid(tokens.patches, self.sparsity.grid))

    def spec_of(self, s: Sparsity, N: int, reduced: bool) -> Spec:
        """The same for other constants; `reduced`: tokens were removed in an earlier block."""
        cells = s.cells_of(N) if reduced else s.cells
        N = int(N)  # a trace has it as a tensor, and takes no list of these
        budgets = tuple(budget(keep, N) for keep in s.keeps)
        return Spec(shortest(budgets), s.prefix, s.tail.name, s.grid, shortest(cells), s.tile, self.scale)

    def shape(self, q: Tensor, mask: Tensor | None, sparse: str, spec: Spec, tokens: TokenState | None = None) -> Shape:
        """What decides how long a call takes: the key of `auto.Chooser`. sparse: what computes the sparse form."""
        B, H, N, d = q.shape
        size, place = (None, None) if tokens is None else (tokens.size, tokens.place)
        device, threads = str(q.device), torch.get_num_threads() if q.device.type == "cpu" else 0
        precision, kind, spec = self.execution.precision, self.predictor.kind(), spec.typical(N)
        shape = Shape(B, H, N, d, q.dtype, device, threads, mask is not None, precision, sparse, kind, spec)
        return shape._replace(merged=size is not None, placed=place is not None, graph=self.execution.graph)

    def extra_repr(self) -> str:
        s = self.sparsity
        keeps, cells = ",".join(f"{keep:g}" for keep in s.keeps), ",".join(f"{r}x{c}" for r, c in s.cells)
        return f"keep={keeps}, tail={s.tail.name}, cells={cells}, heads={self.num_heads}"


def sparse_modules(model: nn.Module) -> dict[str, SparseAttention]:
    """The sparse attention modules of a model, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseAttention)}


def attention_modules(model: nn.Module) -> dict[str, GraftedAttention]:
    """The grafted attention modules of a model, sparse and dense, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GraftedAttention)}


def check_sparse(model: nn.Module) -> None:
    """Raise `SparsifyError` unless the model was converted."""
    if not attention_modules(model):
        raise SparsifyError("this model has no sparse attention: convert it first")
