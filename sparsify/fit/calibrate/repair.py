"""Least squares for what sparsity broke: the last linear map of every attention and MLP is fitted anew, block after block.

With h the input of such a map (`attn.proj`, `mlp.fc2`) in the sparse model, x the residual stream that it is added to, and
t what the dense model's residual stream is behind it,

    dW = argmin  sum over rows  w |t - x - W h - dW h|^2  +  lambda |dW|^2            (and the bias)

The blocks before are repaired already, so what they left is made good as far as a linear map can. No gradient, no label: the
Gram matrices of h, one block at a time. Where tokens have left, t is the mean over the patches that went into a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from sparsify.errors import UsageError
from sparsify.nn import hosts
from sparsify.nn.token_models import FewerTokens
from sparsify.nn.tokens import TokenState
from sparsify.recipe import Repair

Progress = Callable[[str, int, int], None]
LEAVE_OUT = "leave it out (--set repair=null)"


@torch.no_grad()
def repair(
    sparse: nn.Module, dense: nn.Module, batches: Iterable[Tensor], how: Repair, progress: Progress = lambda *step: None
) -> None:
    """Fits the maps of `sparse` in place.

    Args:
        sparse: calibrated; dense: what it was made from; both in eval mode on one device.
        batches: images, float32 [B, C, H, W]. The residual streams of all of them are kept: 2 to 4 times images x N x C
            numbers.

    Raises:
        UsageError: blocks whose maps do not end in the residual stream (norms behind attention and MLP).
    """
    check(sparse)
    host, fewer = cast(Any, sparse), isinstance(sparse, FewerTokens)
    prefix = hosts.num_prefix_tokens(sparse)
    teacher = [_first(dense, x) for x in batches]
    student: list[tuple[Tensor, TokenState | None]] = []
    for x in teacher:
        owner = torch.arange(x.shape[1] - prefix, device=x.device).expand(len(x), -1)  # (B, n0)
        student.append((x, TokenState(x.shape[1] - prefix, owner=owner) if fewer else None))
    blocks = list(zip(host.blocks, cast(Any, dense).blocks, strict=True))
    for i, (own, other) in enumerate(blocks):
        progress("repair", i, len(blocks))
        pairs = [_teach(other, x) for x in teacher]
        middle, teacher = [m for m, _ in pairs], [t for _, t in pairs]
        if "attention" in how.layers:
            fit = Fit(own.attn.proj, own.ls1, how)
            for (x, tokens), t in zip(student, middle, strict=True):
                h = _seen(own, own.attn.proj, x, tokens)
                rows = h.shape[1]  # the prefix alone, where no patch token goes on
                fit.add(h, x[:, :rows], _of_tokens(t, tokens, prefix)[:, :rows], prefix)
            fit.solve()
        fc2 = getattr(own.mlp, "fc2", None)
        if "mlp" in how.layers and isinstance(fc2, nn.Linear):
            fit = Fit(fc2, own.ls2, how)
            for (x, tokens), t in zip(student, teacher, strict=True):
                with _first_input(own.norm2) as stream, _first_input(fc2) as inputs:
                    after = _through(own, x, tokens)[1]
                fit.add(inputs[0], stream[0], _of_tokens(t, after, prefix), prefix)
            fit.solve()
        student = [_through(own, x, tokens) for x, tokens in student]
    progress("repair", len(blocks), len(blocks))


def check(model: nn.Module) -> None:
    """Raise `UsageError` where the maps of `model` do not end in the residual stream."""
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"repair: not for a {type(model).__name__}, only for a VisionTransformer; {LEAVE_OUT}")
    if not all(isinstance(block, Block) for block in cast(Any, model).blocks):
        raise UsageError(f"repair: this model has norms behind its attention and MLP; {LEAVE_OUT}")


class Fit:
    """The weighted least squares of one linear map: running sums over rows, float64."""

    def __init__(self, linear: nn.Linear, scale: nn.Module, how: Repair) -> None:
        self.linear, self.how = linear, how
        self.gamma = getattr(scale, "gamma", None)  # of LayerScale, between the map and the residual stream
        k, device = linear.in_features + 1, linear.weight.device
        self.gram = torch.zeros(k, k, dtype=torch.float64, device=device)
        self.cross = torch.zeros(k, linear.out_features, dtype=torch.float64, device=device)

    def add(self, h: Tensor, x: Tensor, t: Tensor, prefix: int) -> None:
        """Rows h [B, n, k], the stream x [B, n, C] that the map's output is added to, and what should come out, t."""
        residual = t - x
        if self.gamma is not None:
            residual = residual / self.gamma
        residual = residual - self.linear(h)
        weight = h.new_ones(h.shape[1])
        weight[:prefix] = self.how.prefix_weight
        h = torch.cat([h, torch.ones_like(h[..., :1])], -1)  # (B, n, k + 1): the last is the bias
        weighted = (h * weight[:, None]).flatten(0, 1)
        self.gram += (weighted.mT @ h.flatten(0, 1)).double()
        self.cross += (weighted.mT @ residual.flatten(0, 1)).double()

    def solve(self) -> None:
        """Adds the solution to the map's weight and bias."""
        ridge = self.how.ridge * self.gram.diagonal()[:-1].mean().clamp_min(1e-12)
        damp = torch.full_like(self.gram[0], float(ridge))
        damp[-1] = 1e-6 * ridge if self.linear.bias is not None else 1e12 * ridge
        found = torch.linalg.solve(self.gram + damp.diag(), self.cross)  # (k + 1, C)
        self.linear.weight.add_(found[:-1].mT.to(self.linear.weight))
        if self.linear.bias is not None:
            self.linear.bias.add_(found[-1].to(self.linear.bias))


def _first(model: nn.Module, x: Tensor) -> Tensor:
    """Images -> the first block's input, [B, P + n0, C]."""
    host = cast(Any, model)
    return host.norm_pre(host.patch_drop(host._pos_embed(host.patch_embed(x))))


def _through(block: nn.Module, x: Tensor, tokens: TokenState | None) -> tuple[Tensor, TokenState | None]:
    return (block(x), None) if tokens is None else block(x, tokens)


def _teach(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The dense residual stream behind attention and behind the MLP of one block."""
    with _first_input(cast(Any, block).norm2) as seen:
        out = block(x)
    return seen[0], out


def _seen(block: nn.Module, layer: nn.Module, x: Tensor, tokens: TokenState | None) -> Tensor:
    with _first_input(layer) as seen:
        _through(block, x, tokens)
    return seen[0]


@contextlib.contextmanager
def _first_input(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what `layer` is given is put into the list."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _of_tokens(t: Tensor, tokens: TokenState | None, prefix: int) -> Tensor:
    """The dense stream [B, P + n0, C] as means over the patches of each token that is present, [B, P + n, C]."""
    if tokens is None or tokens.owner is None or tokens.place is None:
        return t
    n = tokens.place.shape[1]
    index = torch.where(tokens.owner < 0, n, tokens.owner)  # (B, n0): the dropped go where nobody looks
    rows = index.unsqueeze(-1).expand(-1, -1, t.shape[2])
    total = t.new_zeros(len(t), n + 1, t.shape[2]).scatter_add(1, rows, t[:, prefix:])
    count = t.new_zeros(len(t), n + 1).scatter_add(1, index, torch.ones_like(index, dtype=t.dtype))
    return torch.cat([t[:, :prefix], (total / count.clamp_min(1).unsqueeze(-1))[:, :n]], 1)
