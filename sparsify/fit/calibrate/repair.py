"""Least squares after sparsification: the last linear map of every attention and MLP is fitted anew, block after block.

With h the input of such a map (`attn.proj`, `mlp.fc2`) in the sparse model, x the residual stream that its output is added
to, and t the dense model's residual stream after the addition,

    dW = argmin  sum over rows  w |t - x - W h - dW h|^2  +  lambda |dW|^2            (and the bias)

Earlier blocks are repaired already, so their remaining error is corrected as far as a linear map can. No gradient, no label:
the Gram matrices of h, one block at a time. Where tokens were merged, t is the mean over the patches of a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from sparsify.nn import hosts
from sparsify.nn.token_models import FewerTokens
from sparsify.nn.tokens import TokenState
from sparsify.recipe import Repair


@torch.no_grad()
def repair(
    sparse: nn.Module,
    dense: nn.Module,
    batches: Iterable[Tensor],
    settings: Repair,
    progress: Callable[[str, int, int], None] = lambda *step: None,
) -> None:
    """Fits the maps of `sparse`, calibrated from `dense`, in place; both in eval mode, and not `unrepairable`.

    batches: images, float32 [B, C, H, W], on the device of the models. The residual streams of all of them are kept: 2 to 4
    times images x N x C numbers.
    """
    prefix = hosts.num_prefix_tokens(sparse)
    host = cast(Any, dense)
    # inputs of the first block, [B, P + n0, C]
    teacher = [host.norm_pre(host.patch_drop(host._pos_embed(host.patch_embed(x)))) for x in batches]
    student: list[tuple[Tensor, TokenState | None]] = []
    for x in teacher:
        owner = torch.arange(x.shape[1] - prefix, device=x.device).expand(len(x), -1)  # (B, n0)
        student.append((x, TokenState(x.shape[1] - prefix, owner=owner) if isinstance(sparse, FewerTokens) else None))
    blocks = list(zip(cast(Any, sparse).blocks, host.blocks, strict=True))
    for i, (block, dense_block) in enumerate(blocks):
        progress("repair", i, len(blocks))
        streams = [_dense_streams(dense_block, x) for x in teacher]
        after_attention, teacher = [s for s, _ in streams], [s for _, s in streams]
        if "attention" in settings.layers:
            fit = _LinearFit(block.attn.proj, block.ls1, settings, prefix)
            for (x, tokens), t in zip(student, after_attention, strict=True):
                with _inputs(block.attn.proj) as inputs:
                    _forward(block, x, tokens)
                rows = inputs[0].shape[1]  # the prefix alone, where all patch tokens are dropped
                fit.add(inputs[0], x[:, :rows], _token_means(t, tokens, prefix)[:, :rows])
            fit.solve()
        fc2 = getattr(block.mlp, "fc2", None)
        if "mlp" in settings.layers and isinstance(fc2, nn.Linear):
            fit = _LinearFit(fc2, block.ls2, settings, prefix)
            for (x, tokens), t in zip(student, teacher, strict=True):
                with _inputs(block.norm2) as stream, _inputs(fc2) as inputs:
                    after = _forward(block, x, tokens)[1]
                fit.add(inputs[0], stream[0], _token_means(t, after, prefix))
            fit.solve()
        student = [_forward(block, x, tokens) for x, tokens in student]
    progress("repair", len(blocks), len(blocks))


def unrepairable(model: nn.Module) -> str:
    """Why `repair` cannot treat `model` (its maps do not end in the residual stream, or another class), or empty."""
    if not isinstance(model, VisionTransformer):
        return f"it is for a VisionTransformer, and this model is a {type(model).__name__}"
    if not all(isinstance(block, Block) for block in cast(Any, model).blocks):
        return "this model has norms after its attention and MLP"
    return ""


class _LinearFit:
    """The weighted least squares of one linear map: running sums over rows, float64."""

    def __init__(self, linear: nn.Linear, scale: nn.Module, settings: Repair, prefix: int) -> None:
        self.linear, self.settings, self.prefix = linear, settings, prefix
        self.gamma = getattr(scale, "gamma", None)  # of LayerScale, between the map and the residual stream
        k, device = linear.in_features + 1, linear.weight.device
        self.gram = torch.zeros(k, k, dtype=torch.float64, device=device)
        self.cross = torch.zeros(k, linear.out_features, dtype=torch.float64, device=device)

    def add(self, h: Tensor, x: Tensor, t: Tensor) -> None:
        """Rows h [B, n, k], the stream x [B, n, C] that the map's output is added to, and the target t of their sum."""
        residual = t - x
        if self.gamma is not None:
            residual = residual / self.gamma
        residual = residual - self.linear(h)
        weight = h.new_ones(h.shape[1])
        weight[: self.prefix] = self.settings.prefix_weight
        h = torch.cat([h, torch.ones_like(h[..., :1])], -1)  # (B, n, k + 1): the last is the bias
        weighted = (h * weight[:, None]).flatten(0, 1)
        self.gram += (weighted.mT @ h.flatten(0, 1)).double()
        self.cross += (weighted.mT @ residual.flatten(0, 1)).double()

    def solve(self) -> None:
        """Adds the solution to the map's weight and bias."""
        ridge = self.settings.ridge * self.gram.diagonal()[:-1].mean().clamp_min(1e-12)
        damp = torch.full_like(self.gram[0], float(ridge))
        damp[-1] = 1e-6 * ridge if self.linear.bias is not None else 1e12 * ridge
        solution = torch.linalg.solve(self.gram + damp.diag(), self.cross)  # (k + 1, C)
        self.linear.weight.add_(solution[:-1].mT.to(self.linear.weight))
        if self.linear.bias is not None:
            self.linear.bias.add_(solution[-1].to(self.linear.bias))


def _forward(block: nn.Module, x: Tensor, tokens: TokenState | None) -> tuple[Tensor, TokenState | None]:
    return (block(x), None) if tokens is None else block(x, tokens)


def _dense_streams(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The dense residual stream after attention and after the MLP of one block."""
    with _inputs(cast(Any, block).norm2) as inputs:
        output = block(x)
    return inputs[0], output


@contextlib.contextmanager
def _inputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the inputs of `layer` are appended to the list."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def _token_means(t: Tensor, tokens: TokenState | None, prefix: int) -> Tensor:
    """The dense stream [B, P + n0, C] as means over the patches of each present token, [B, P + n, C]."""
    if tokens is None or tokens.owner is None or tokens.place is None:
        return t
    n = tokens.place.shape[1]
    # (B, n0): dropped patches are summed in a row that is cut off
    index = torch.where(tokens.owner < 0, n, tokens.owner)
    rows = index.unsqueeze(-1).expand(-1, -1, t.shape[2])
    total = t.new_zeros(len(t), n + 1, t.shape[2]).scatter_add(1, rows, t[:, prefix:])
    count = t.new_zeros(len(t), n + 1).scatter_add(1, index, torch.ones_like(index, dtype=t.dtype))
    return torch.cat([t[:, :prefix], (total / count.clamp_min(1).unsqueeze(-1))[:, :n]], 1)
