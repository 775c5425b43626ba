"""Attention in the place of a host's: same parameters, same names. Sparse with a `predictor`, or dense.

Both know tokens that have left or were merged (`sparsify.nn.tokens`), which timm's own does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.config import grid_of, growth
from sparsify.nn import projection
from sparsify.nn.predictor import Predictor
from sparsify.nn.tokens import TokenState
from sparsify.ops import attention, auto, backends, tails
from sparsify.ops.auto import Choice, Chooser
from sparsify.ops.selection import Context, cells_of
from sparsify.ops.spec import Shape, Spec, budget


@dataclass(frozen=True)
class Execution:
    """How an attention module computes; plain configuration, no part of the model's file or state dict.

    Attributes:
        backend: auto, cpu or reference (`sparsify.ops.backends`); auto is cpu where the kernels are available.
        precision: input, or bf16: float32 tensors with bfloat16 storage of q, k, v inside the kernels.
        dense_fallback: dense attention may be computed instead of the sparse form where `choose` measured it faster;
            never in training, nor where a gradient is needed, nor once the model or a copy of it has been in train mode
            (`Chooser.withdraw`). For models whose weights are the dense original's.
        choose: measures and remembers; None: no dense fallback.
    """

    backend: str = "auto"
    precision: str = "input"
    dense_fallback: bool = False
    choose: Chooser | None = None


class Path(NamedTuple):
    """What computes a call: cpu, reference or one of `auto.DENSE`; and the decision that it rests on, if one was made."""

    taken: str
    choice: Choice | None


@dataclass(frozen=True)
class Sparsity:
    """Constants of one block's sparse attention; the words are those of `sparsify.config.SparsityConfig`."""

    keep: float
    prefix: int
    tail: tails.Tail
    grid: tuple[int, int]
    cells: tuple[int, int]
    tile: tuple[int, ...] = ()  # empty: one key set for each query

    def cells_of(self, N: int) -> tuple[int, int]:
        """Grid of cells where only N tokens are present: fewer, by the rule of `SparsityConfig.with_cells`."""
        own = self.prefix + self.grid[0] * self.grid[1]
        if own <= N:
            return self.cells
        return grid_of(self.cells[0] * self.cells[1] * growth(N) / growth(own))


class GraftedAttention(nn.Module):
    """The frame of timm's attention classes: q, k, v of x; attention; proj. How queries meet keys is the subclass's.

    Takes over everything that the host has (parameters, buffers, submodules, constants), so state dict keys stay timm's;
    what differs between the hosts is `sparsify.nn.projection`'s.

    Args:
        host: of a class of `projection.UNDERSTOOD`, or a grafted attention.
        rotary: the host's model passes a rotary embedding.

    Attributes:
        execution: backend, precision and whether dense attention may stand in; `graft.set_execution` sets it.
        watch: called with q, k, v of every pass; set by `observe.watching` for as long as it lasts.
        importance: w and b, [C + 1], a buffer; None: by attention (`sparsify.nn.importance`).
    """

    proj: nn.Linear
    attn_drop: nn.Dropout
    importance: Tensor | None
    OWN = ("predictor", "sparsity", "execution", "watch", "host_class", "rotary")

    def __init__(self, host: nn.Module, rotary: bool = False) -> None:
        super().__init__()
        self.host_class: type[nn.Module] = type(host)
        self.rotary = rotary
        if isinstance(host, GraftedAttention):
            self.host_class, self.rotary = host.host_class, host.rotary
        self.execution = Execution()
        self.watch: Callable[[Tensor, Tensor, Tensor], None] | None = None
        self.register_buffer("importance", None)
        _hand_over(host, self, self.OWN)
        self.num_heads, self.head_dim = projection.heads_of(host), projection.head_dim(host)
        self.scale = self.head_dim**-0.5  # scaled_dot_product_attention's, which the host uses

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: TokenState | None) -> Tensor:
        """[B, H, N, d] x 3 -> [B, N, H*d]."""
        raise NotImplementedError

    def qkv_heads(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B, N, C] as their product meets them: [B, H, N, d] each, one dtype."""
        if rope is not None and not self.rotary:
            raise ValueError("this attention was grafted for a model without rotary embedding: it takes none")
        q, k, v = projection.heads(self, x, rope)
        if self.watch is not None:
            self.watch(q, k, v)
        return q, k, v

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [B, N, C] -> [B, N, C].

        Args:
            attn_mask: bool (True: may attend) or additive, broadcastable to [B, H, N, N].
            rope: see `projection.heads`.
            shared_rel_pos_bias: added to the logits, [1, H, N, N], with the module's own bias where it has one.
        """
        if is_causal:
            attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        bias = projection.position_bias(self, shared_rel_pos_bias)
        q, k, v = self.qkv_heads(x, rope)
        return self.close(self.attend(q, k, v, joined(attn_mask, bias), None), x)

    def close(self, out: Tensor, x: Tensor) -> Tensor:
        """What follows the attention, for rows x [B, N, C] of the input: norm, gate and projection of out [B, N, H*d]."""
        return projection.close(self, out, x)

    def prefix_rows(
        self, x: Tensor, prefix: int, tokens: TokenState, rope: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The rows of the P prefix tokens alone, which attend to all keys: x [B, N, C] -> [B, P, C]; bias [B, H, N, N]."""
        self._refuse_dropout()
        q, k, v = projection.prefix_heads(self, x, prefix, rope)
        bias = None if bias is None else bias[:, :, :prefix]
        out = attention.dense("sdpa", q, k, v, bias, self.scale, "input", tokens.size)
        return self.close(out, x[:, :prefix])

    def _refuse_dropout(self) -> None:
        if self.training and self.attn_drop.p > 0:
            raise NotImplementedError("attention dropout is not defined for grafted attention: set attn_drop_rate=0")

    def dense(self) -> nn.Module:
        """The host again: timm's own class over the same parameters."""
        host = self.host_class.__new__(self.host_class)
        nn.Module.__init__(host)
        _hand_over(self, host, (*self.OWN, "importance"))
        return host.train(self.training)

    def take(self, host: nn.Module) -> None:
        """What the host has become (another image size), in place; the rest stays."""
        _hand_over(host, self, self.OWN)


def joined(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A mask (bool or additive) and a bias of the logits as one additive mask."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def _hand_over(host: nn.Module, to: nn.Module, leave: tuple[str, ...]) -> None:
    """Parameters, buffers, submodules and constants of `host`, shared with `to`, under the same names."""
    for name, parameter in host._parameters.items():
        to.register_parameter(name, parameter)
    for name, buffer in host._buffers.items():
        if name in leave:
            continue
        to.register_buffer(name, buffer, persistent=name not in host._non_persistent_buffers_set)
    for name, module in host._modules.items():
        if name not in leave:
            to.register_module(name, module)
    plain = {k: v for k, v in host.__dict__.items() if not k.startswith("_") and k not in (*leave, "training")}
    to.__dict__.update(plain)


class DenseAttention(GraftedAttention):
    """Every query attends to every token that is present."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: TokenState | None) -> Tensor:
        """[B, H, N, d] x 3 -> [B, N, H*d]."""
        self._refuse_dropout()
        size = None if tokens is None else tokens.size
        path = "sdpa" if backends.needs_grad(q, k, v) else self.path(q, mask)
        return attention.dense(path, q, k, v, mask, self.scale, self.execution.precision, size)

    def path(self, q: Tensor, mask: Tensor | None) -> str:
        """What computes a call without gradients, one of `auto.DENSE`: our kernel where it is available, else torch's."""
        runs_here = backends.eager(q) or backends.compiling()
        kernel = runs_here and backends.resolve(self.execution.backend, q, mask) == "cpu"
        return "dense-cpu" if kernel else "sdpa"

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}"


class SparseAttention(GraftedAttention):
    """X' = softmax over the predicted keys and the tail.

        q, k, v = qkv(x);  out_i = sum over the b keys of i with the highest predicted score, and the tail;  proj(out)

    Args:
        host, rotary: see `GraftedAttention`.
        predictor: see `sparsify.nn.predictor`.
        sparsity: keep share, prefix tokens, tail.
    """

    def __init__(
        self,
        host: nn.Module,
        predictor: Predictor,
        sparsity: Sparsity,
        rotary: bool = False,
    ) -> None:
        super().__init__(host, rotary)
        self.sparsity = sparsity
        self.predictor = predictor

    def train(self, mode: bool = True) -> SparseAttention:
        """As torch's. Weights that were trained are not the dense model's any more: from the first time on that the model
        or a copy of it (an average of weights, a teacher) is in train mode, dense attention stands in for none of them.
        """
        if mode and self.execution.choose is not None:
            self.execution.choose.withdraw()
        super().train(mode)
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: TokenState | None) -> Tensor:
        """[B, H, N, d] x 3 -> [B, N, H*d], by the path that `execution` leads to."""
        self._refuse_dropout()
        spec = self.spec(q.shape[2], tokens)
        trains = backends.needs_grad(q, k, v)
        if trains:
            path = backends.training(self.execution.backend, q, mask)
        elif backends.needs_grad(*self.predictor.parameters()):
            path = (
                "reference"  # a predictor that learns alone gets no gradient of its choice, and the reference says so
            )
        else:
            path = self.path(q, mask, tokens, spec).taken
        if path in auto.DENSE:
            size = None if tokens is None else tokens.size
            return attention.dense(path, q, k, v, mask, self.scale, self.execution.precision, size)
        return self.sparse(q, k, v, mask, tokens, spec, path)

    def sparse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        tokens: TokenState | None,
        spec: Spec,
        backend: str,
    ) -> Tensor:
        """The sparse form: the predictor ranks the keys, the op attends to the b highest and to the tail.

        [B, H, N, d] x 3 -> [B, N, H*d]; backend: cpu, masked or reference.
        """
        size, place = (None, None) if tokens is None else (tokens.size, tokens.place)
        ranking, context = self.predictor(q, k, mask, tokens, spec), Context(mask, size, place)
        if not tails.known(self.sparsity.tail):
            cell, count = cells_of(self.sparsity.tail, ranking.written(q, k), context, spec)
            context = context._replace(cell=cell)
            spec = spec._replace(tail=tails.ASSIGNED, cells=(1, count - min(spec.prefix, q.shape[2])))
        return attention.attention(q, k, v, ranking, context, spec, backend, self.execution.precision)

    def path(self, q: Tensor, mask: Tensor | None, tokens: TokenState | None, spec: Spec) -> Path:
        """What computes a call without gradients: the sparse form, or dense attention where it may stand in and was
        measured faster."""
        e = self.execution
        path = backends.resolve(e.backend, q, mask)
        may_be_dense = e.dense_fallback and e.choose is not None and not self.training and backends.eager(q)
        if not may_be_dense or e.choose is None or e.choose.withdrawn:
            return Path(path, None)
        choice = e.choose.choose(self.shape(q, mask, path, spec, tokens), partial(self._timed, spec=spec, backend=path))
        return Path(choice.taken, choice)

    def _timed(self, q: Tensor, k: Tensor, v: Tensor, context: Context, spec: Spec, backend: str) -> Tensor:
        """The sparse form as `auto` times it: merged tokens are looked up as if they had been removed."""
        tokens = None
        if context.size is not None or context.place is not None:
            tokens = TokenState(spec.grid[0] * spec.grid[1], context.size, context.place)
        return self.sparse(q, k, v, context.mask, tokens, spec, backend)

    def spec(self, N: int, tokens: TokenState | None = None) -> Spec:
        """The constants of a call with N tokens; cells are fewer where tokens were removed."""
        if tokens is None or tokens.place is None:
            return self.spec_of(self.sparsity, N, False)
        spec = self.spec_of(self.sparsity, N, True)  # places are on the grid of this image, which may have another size
        return spec._replace(grid=tails.patch_grid(tokens.patches, self.sparsity.grid))

    def spec_of(self, s: Sparsity, N: int, reduced: bool) -> Spec:
        """The same for other constants; `reduced`: tokens were removed in an earlier block."""
        cells = s.cells_of(N) if reduced else s.cells
        return Spec(budget(s.keep, N), s.prefix, s.tail.name, s.grid, cells, s.tile, self.scale)

    def shape(self, q: Tensor, mask: Tensor | None, sparse: str, spec: Spec, tokens: TokenState | None = None) -> Shape:
        """What decides how long a call takes: the key of `auto.Chooser`. sparse: what computes the sparse form."""
        B, H, N, d = q.shape
        size, place = (None, None) if tokens is None else (tokens.size, tokens.place)
        return Shape(
            batch=B,
            heads=H,
            tokens=N,
            head_dim=d,
            dtype=q.dtype,
            device=q.device.type,
            threads=torch.get_num_threads(),
            masked=mask is not None,
            precision=self.execution.precision,
            sparse=sparse,
            kind=self.predictor.kind(),
            spec=spec,
            merged=size is not None,
            placed=place is not None,
        )

    def extra_repr(self) -> str:
        s = self.sparsity
        return f"keep={s.keep:g}, tail={s.tail.name}, cells={s.cells[0]}x{s.cells[1]}, heads={self.num_heads}"


def sparse_modules(model: nn.Module) -> dict[str, SparseAttention]:
    """The sparse attention modules of a model, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseAttention)}


def attention_modules(model: nn.Module) -> dict[str, GraftedAttention]:
    """The grafted attention modules of a model, sparse and dense, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GraftedAttention)}
