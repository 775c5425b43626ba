"""The importance I of patch tokens, which decides which of them are removed and weights their means (`sparsify.nn.tokens`).

    attention   the attention that a token gets from the cls row (and the distillation token's) of this block, mean over
                heads; without a cls token, from the mean query of all tokens
    fitted      I_j = s_j e^(w . norm(x_j) + b): how much later rows will read of a token, predicted from the token. w and
                b are fitted to the dense model in closed form (`sparsify.fit.calibrate.token_importance`)

Tokens are removed in the first blocks, where the cls row attends to hardly anything yet: the features of a token predict
what it will read later better than its present attention does. s_j is the token's size (`TokenState.size`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.ops.gpu import tokens as gpu

TINY = 1e-20  # lower bound of an importance: a softmax may underflow


def attention_importance(
    q: Tensor, k: Tensor, scale: float, size: Tensor | None, rows: int, prefix: int, bias: Tensor | None = None
) -> Tensor:
    """I by attention, mean over heads: float32 [B, n], above 0. prefix: P; other arguments: see `ranking_attention`."""
    if gpu.ranks(q, k, bias):
        return gpu.attention_importance(q, k, size, scale, rows, prefix, TINY)
    return ranking_attention(q, k, scale, size, rows, bias).mean((1, 2))[:, prefix:].clamp_min(TINY)


def ranking_attention(
    q: Tensor, k: Tensor, scale: float, size: Tensor | None, rows: int, bias: Tensor | None = None
) -> Tensor:
    """Attention of the rows that rank the tokens: float32 [B, H, rows or 1, N], without a gradient.

    Args:
        q, k: [B, H, N, d].
        size: [B, N] or None; its logarithm is added to the logits.
        rows: number of leading rows that rank (cls, distillation); 0: the mean query does.
        bias: of the logits, [1 or B, H, N, N]; averaged over rows for the mean query.
    """
    q, k = q.detach().float(), k.detach().float()
    q = q[:, :, :rows] if rows else q.mean(2, keepdim=True)  # (B, H, rows or 1, d)
    logits = plain_matmul(q, k.mT) * scale  # (B, H, rows or 1, N)
    if bias is not None:
        logits = logits + (bias[:, :, :rows] if rows else bias.mean(2, keepdim=True)).detach().float()
    if size is not None:
        logits = logits + size.log()[:, None, None]
    return logits.softmax(-1)


def fitted_importance(x: Tensor, weights: Tensor, size: Tensor | None, prefix: int) -> Tensor:
    """I predicted from the tokens: float32 [B, n], above 0, without a gradient.

    Args:
        x: residual stream after the block's attention, [B, P + n, C].
        weights: w and b, [C + 1].
        size: [B, P + n], or None.
        prefix: P.
    """
    if gpu.takes(x, prefix):
        return gpu.fitted_importance(x, weights, size, prefix, TINY)
    weights = weights.float()
    score = plain_matmul(features(x[:, prefix:]), weights[:-1, None]).squeeze(-1) + weights[-1]  # (B, n)
    return (score if size is None else score + size[:, prefix:].log()).exp().clamp_min(TINY)


def features(patch: Tensor) -> Tensor:
    """norm(x): layer norm without parameters of a residual stream [..., C]; float32, without a gradient."""
    return nn.functional.layer_norm(patch.detach().float(), patch.shape[-1:])


def plain_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype of a and b, also under autocast."""
    device = a.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return a @ b
    with torch.autocast(device, enabled=False):
        return a @ b
