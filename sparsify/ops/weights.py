"""The weights that an attention call gives to keys and tail, written out, for pictures and tests.

No op writes these out. They are those of equation 3 of `docs/design.md`; the tests compare them with what the op gives for
values that are unit vectors. The keys are those of `selection.kept`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.ops import selection


def weights(
    q: Tensor, k: Tensor, kept: Tensor, a: Tensor | None, bias: Tensor | None, size: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights that rows of the attention give to the keys they keep, and to their tail; both together sum to 1.

    Args:
        q: [B, H, rows, d]; k: [B, H, N, d].
        kept: bool [B, H, rows, N]; a: cells of the keys, see `cells`.
        bias: additive mask of these rows, [B, H, rows, N]; None: none.
        size: [B, N]; None: 1 each.

    Returns:
        [B, H, rows, N], 0 where a key was dropped; [B, H, rows].
    """
    plain = (q @ k.mT) * scale  # (B, H, rows, N)
    share = torch.ones_like(plain) if bias is None else bias.exp()  # what a key counts for a row
    if size is not None:
        share = share * size.to(q.dtype)[:, None, None]
    logits = (plain + share.log()).masked_fill(~kept, -torch.inf)
    if a is None:
        weight = logits.softmax(-1).nan_to_num()
        return weight, torch.zeros_like(weight[..., 0])
    member = torch.nn.functional.one_hot(a, int(a.max()) + 1).to(q.dtype)  # (B, H, N, m)
    dropped = share.masked_fill(kept, 0) @ member  # (B, H, rows, m)
    if bias is not None and bool((bias <= selection.HIDDEN).any()):  # every row has its own cell means
        mean = (share * plain) @ member / (share @ member).clamp_min(torch.finfo(q.dtype).tiny)
    else:
        sized = member if size is None else member * size.to(q.dtype)[:, None, :, None]
        mean = plain @ sized / sized.sum(-2, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    tail = mean.masked_fill(dropped == 0, -torch.inf) + dropped.log()
    both = torch.cat([logits, tail], -1).softmax(-1).nan_to_num()
    return both[..., : k.shape[2]], both[..., k.shape[2] :].sum(-1)


def dense(q: Tensor, k: Tensor, bias: Tensor | None, size: Tensor | None, scale: float) -> Tensor:
    """Softmax over all keys, which no predictor chose from: [B, H, rows, N]; arguments as `weights`."""
    logits = (q @ k.mT) * scale
    if size is not None:
        logits = logits + size.to(q.dtype).log()[:, None, None]
    return (logits if bias is None else logits + bias).softmax(-1).nan_to_num()
