"""The losses: tensors in, one number out, a mean over the images of the call, without weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.measure.accuracy import kl_terms

SMALLEST = 1e-8  # lower bound of an estimated attention in a logarithm
SOFTNESS = 0.05  # width of the step between kept and dropped keys, in standard deviations of a row's scores
NEWTON_STEPS = 8  # to the threshold of that step; kept keys add up to b within 0.01 of a key


def classification(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits [B, classes] with soft targets y [B, classes], nats."""
    return -(y * logits.float().log_softmax(-1)).sum(-1).mean()


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of class probabilities at temperature T, from logits [B, classes], nats."""
    return temperature**2 * kl_terms(teacher.float() / temperature, student.float() / temperature).sum(-1).mean()


def outputs(teacher: Tensor, student: Tensor, scale: float) -> Tensor:
    """Squared difference of outputs [B, C] over `scale`, the mean of the teacher's squares: for those that are no logits."""
    return (teacher.float() - student.float()).square().sum(-1).mean() / scale


def tokens(teacher: Tensor, student: Tensor, present: Tensor | None) -> Tensor:
    """Mean squared error of patch tokens [B, n, C] over those `present`, bool [B, n]; None: all."""
    error = (teacher.float() - student.float()).square().mean(-1)  # (B, n)
    if present is None:
        return error.mean()
    return (error * present).sum() / present.sum().clamp_min(1)


def features(teacher: Tensor, student: Tensor, present: Tensor | None, prefix: int) -> Tensor:
    """Relative squared error of a block's output [B, N, C], image by image.

    The prefix tokens, which the classifier reads, weigh as much as all patch tokens together. present: see `tokens`.
    """
    error = (teacher.float() - student.float()).square().mean(-1)  # (B, N)
    size = teacher.float().square().mean(-1)
    parts = []
    if prefix < error.shape[1]:
        weight = torch.ones_like(error[:, prefix:]) if present is None else present.float()
        patch_error = (error[:, prefix:] * weight).sum(1) / weight.sum(1).clamp_min(1)
        parts.append(patch_error / size[:, prefix:].mean(1).clamp_min(1e-12))
    if prefix:
        parts.append(error[:, :prefix].mean(1) / size[:, :prefix].mean(1).clamp_min(1e-12))
    return torch.stack(parts).mean()


def pooled(teacher: Tensor, student: Tensor) -> Tensor:
    """Relative squared error of pooled features [B, C], image by image."""
    t, s = teacher.float(), student.float()
    return ((t - s).square().sum(-1) / t.square().sum(-1).clamp_min(1e-12)).mean()


def attention(estimate: Tensor, target: Tensor, form: str, reference_batch: int) -> Tensor:
    """The predictor's attention [B, H, n, N] against the true one, rows of the patch queries; image by image, [B].

    Form 'mse-sum': squares summed over heads, rows and keys, times reference_batch, so that the mean over images is the sum
    over that many images (Sparsifiner, stage 1). Form 'kl': KL(target || estimate), nats, mean over rows; the estimate's
    rows are made positive and normalised.
    """
    if form == "mse-sum":
        return (estimate - target).square().sum((1, 2, 3)) * reference_batch
    estimate = estimate.clamp_min(SMALLEST)
    estimate = estimate / estimate.sum(-1, keepdim=True)
    return (target * (target.clamp_min(SMALLEST).log() - estimate.log())).sum(-1).mean((1, 2))


def over_blocks(errors: list[Tensor], form: str) -> Tensor:
    """Mean over images of the mean ('mean') or root mean square ('rms') over blocks of errors [B] of each block."""
    each = torch.stack(errors)  # (blocks, B)
    return each.mean() if form == "mean" else (each.square().mean(0) + SMALLEST**2).sqrt().mean()


def lost_mass(scores: Tensor, target: Tensor, budgets: Sequence[int]) -> Tensor:
    """Fraction of the true attention `target` [B, H, n, N] on keys that are dropped, 0 to 1, mean over rows.

    The b highest scores [B, H, n, N] are kept, with a soft step (`soft_top`) that is `SOFTNESS` of the row's deviation wide.
    budgets: b of each head, or one for all.
    """
    heads = zip(scores.chunk(len(budgets), 1), target.chunk(len(budgets), 1), budgets, strict=True)
    return torch.stack([_lost_mass(*head) for head in heads]).mean()


def _lost_mass(scores: Tensor, target: Tensor, b: int) -> Tensor:
    if b >= scores.shape[-1]:
        return (scores * 0).sum()
    width = (SOFTNESS * scores.detach().std(-1, keepdim=True)).clamp_min(1e-12)
    return 1 - (target * soft_top(scores, b, width)).sum(-1).mean()


def soft_top(scores: Tensor, b: int, width: Tensor) -> Tensor:
    """The b highest of scores [..., N] as numbers between 0 and 1 that sum to b: logistic((scores - t) / width).

    Newton steps find the threshold t for which they sum to b, and t has a gradient: a key gains only what others lose, and
    raising all scores changes nothing. (With a constant t, flat scores would keep the most.) b: 1 to N - 1; width: > 0,
    [..., 1], a narrow one gives numbers near 0 and 1.
    """
    x = scores / width
    x = x - x.detach().topk(b, dim=-1).values[..., -1:]
    fixed = x.detach()
    t, kept = torch.zeros_like(fixed[..., :1]), fixed.sigmoid()
    for _ in range(NEWTON_STEPS):
        slope = (kept * (1 - kept)).sum(-1, keepdim=True).clamp_min(1e-6)
        t = t + ((kept.sum(-1, keepdim=True) - b) / slope).clamp(-1, 1)
        kept = (fixed - t).sigmoid()
    share = kept * (1 - kept)
    share = share / share.sum(-1, keepdim=True).clamp_min(1e-12)  # dt/dx of each key
    return (x - (t + ((x - fixed) * share).sum(-1, keepdim=True))).sigmoid()
