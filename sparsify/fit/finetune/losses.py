"""The losses: tensors in, one number out, a mean over the images of the call. No weights, no models."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-8  # of an estimated attention, where its logarithm is taken
SOFTNESS = 0.05  # of the step between keys that are kept and dropped, in standard deviations of a row's scores
NEWTON_STEPS = 8  # to the threshold of that step; kept keys add up to b within 0.01 of a key


def classification(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits [B, classes] with soft targets y [B, classes], nats."""
    return -(y * logits.float().log_softmax(-1)).sum(-1).mean()


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of class probabilities at temperature T, from logits [B, classes], nats."""
    t, s = (teacher.float() / temperature).log_softmax(-1), (student.float() / temperature).log_softmax(-1)
    return temperature**2 * (t.exp() * (t - s)).sum(-1).mean()


def tokens(teacher: Tensor, student: Tensor, present: Tensor | None) -> Tensor:
    """Mean squared error of patch tokens [B, n, C]; `present` [B, n], bool: those that count, None for all."""
    error = (teacher.float() - student.float()).square().mean(-1)  # (B, n)
    if present is None:
        return error.mean()
    return (error * present).sum() / present.sum().clamp_min(1)


def features(teacher: Tensor, student: Tensor, present: Tensor | None, prefix: int) -> Tensor:
    """Squared error of a block's output [B, N, C] as a share of the teacher's squares, image by image.

    The prefix tokens, which the classifier reads, weigh as much as all patch tokens together. present: see `tokens`.
    """
    error = (teacher.float() - student.float()).square().mean(-1)  # (B, N)
    size = teacher.float().square().mean(-1)
    parts = []
    if prefix < error.shape[1]:
        weight = torch.ones_like(error[:, prefix:]) if present is None else present.float()
        wrong = (error[:, prefix:] * weight).sum(1) / weight.sum(1).clamp_min(1)
        parts.append(wrong / size[:, prefix:].mean(1).clamp_min(1e-12))
    if prefix:
        parts.append(error[:, :prefix].mean(1) / size[:, :prefix].mean(1).clamp_min(1e-12))
    return torch.stack(parts).mean()


def pooled(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared error of pooled features [B, C] as a share of the teacher's squares, image by image."""
    t, s = teacher.float(), student.float()
    return ((t - s).square().sum(-1) / t.square().sum(-1).clamp_min(1e-12)).mean()


def attention(estimate: Tensor, target: Tensor, form: str, reference_batch: int) -> Tensor:
    """The predictor's attention [B, H, n, N] against the true one, rows of the patch queries; image by image, [B].

    Args:
        form: 'mse-sum': squares summed over heads, rows and keys, times reference_batch, so that the mean over images is
            the sum over that many of them (Sparsifiner, stage 1); 'kl': KL(target || estimate), the estimate's rows made
            positive and normalised, nats, mean over rows.
    """
    if form == "mse-sum":
        return (estimate - target).square().sum((1, 2, 3)) * reference_batch
    estimate = estimate.clamp_min(SMALLEST)
    estimate = estimate / estimate.sum(-1, keepdim=True)
    return (target * (target.clamp_min(SMALLEST).log() - estimate.log())).sum(-1).mean((1, 2))


def over_blocks(errors: list[Tensor], way: str) -> Tensor:
    """One number of the errors [B] of each block: their mean ('mean') or root mean square ('rms') image by image, and of
    that the mean over images."""
    each = torch.stack(errors)  # (blocks, B)
    return each.mean() if way == "mean" else (each.square().mean(0) + SMALLEST**2).sqrt().mean()


def lost_mass(scores: Tensor, target: Tensor, b: int) -> Tensor:
    """Share of the true attention on keys that scores [..., N] drop, 0 to 1: target [..., N], mean over rows.

    Kept are the b highest, with a soft step (`soft_top`) that is `SOFTNESS` of the row's deviation wide.
    """
    if b >= scores.shape[-1]:
        return (scores * 0).sum()
    width = (SOFTNESS * scores.detach().std(-1, keepdim=True)).clamp_min(1e-12)
    return 1 - (target * soft_top(scores, b, width)).sum(-1).mean()


def soft_top(scores: Tensor, b: int, width: Tensor) -> Tensor:
    """The b highest of scores [..., N] as numbers between 0 and 1 that sum to b: logistic((scores - t) / width).

    The threshold t, which makes them sum to b, is found by Newton steps and moves with the scores: a key comes in only as
    far as others go out, and lifting all of them changes nothing. (Without that, flat scores would keep the most.)

    Args:
        b: 1 to N - 1.
        width: > 0, [..., 1]. The narrower, the nearer to 0 and 1.
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
