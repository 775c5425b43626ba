"""The importance I of patch tokens, by which they are chosen and averaged where some leave (`sparsify.nn.tokens`).

    attention   what a token is given by the cls row (and the distillation token's) of this block, mean over heads; where
                there is no cls token, by the mean query of all tokens
    fitted      I_j = s_j e^(w . norm(x_j) + b): how much later rows will read of it, told from the token itself. w and b
                are fitted to the dense model in closed form (`sparsify.fit.calibrate.token_importance`)

Tokens leave in the first blocks while the cls row hardly attends to anything yet; what it will read is better told from what
a token says than from what it is given now. s_j is the token's size (`Tokens.size`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TINY = 1e-20  # importance below it counts as this: a softmax may underflow


def given(
    q: Tensor, k: Tensor, scale: float, size: Tensor | None, rows: int, prefix: int, bias: Tensor | None = None
) -> Tensor:
    """I by attention: what each patch token is given, mean over heads: float32 [B, n], above 0. Arguments: see `asked`."""
    return asked(q, k, scale, size, rows, bias).mean((1, 2))[:, prefix:].clamp_min(TINY)


def asked(q: Tensor, k: Tensor, scale: float, size: Tensor | None, rows: int, bias: Tensor | None = None) -> Tensor:
    """The attention of the rows that ask: float32 [B, H, rows or 1, N], without a gradient.

    Args:
        q, k: [B, H, N, d].
        size: [B, N] or None; its logarithm is added to the logits.
        rows: leading rows whose attention counts (cls, distillation); 0: that of the mean query.
        bias: of the logits, [1 or B, H, N, N]; its mean goes with the mean query.
    """
    q, k = q.detach().float(), k.detach().float()
    asking = q[:, :, :rows] if rows else q.mean(2, keepdim=True)  # (B, H, rows or 1, d)
    logits = product(asking, k.mT) * scale  # (B, H, rows, N)
    if bias is not None:
        logits = logits + (bias[:, :, :rows] if rows else bias.mean(2, keepdim=True)).detach().float()
    if size is not None:
        logits = logits + size.log()[:, None, None]
    return logits.softmax(-1)


def fitted(patch: Tensor, weights: Tensor, size: Tensor | None) -> Tensor:
    """I told from the tokens: float32 [B, n], above 0, without a gradient.

    Args:
        patch: the residual stream of the patch tokens behind the block's attention, [B, n, C].
        weights: w and b, [C + 1].
        size: of the patch tokens, [B, n], or None.
    """
    weights = weights.float()
    score = product(features(patch), weights[:-1, None]).squeeze(-1) + weights[-1]  # (B, n)
    return (score if size is None else score + size.log()).exp().clamp_min(TINY)


def features(patch: Tensor) -> Tensor:
    """norm(x): a layer norm without parameters, of any host's residual stream [..., C]; float32, without a gradient."""
    return nn.functional.layer_norm(patch.detach().float(), patch.shape[-1:])


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype, where autocast would lower it too."""
    kind = a.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return a @ b
    with torch.autocast(kind, enabled=False):
        return a @ b
