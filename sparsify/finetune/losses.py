"""The losses: tensors in, one number out, a mean over the images of the call. No weights, no models."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-8  # of an estimated attention, where its logarithm is taken
SOFTNESS = 0.25  # of the step between keys that are kept and dropped, in standard deviations of a row's scores


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


def attention(estimate: Tensor, target: Tensor, form: str, reference_batch: int, b: int) -> Tensor:
    """The predictor's attention [B, H, n, N] against the true one, rows of the patch queries.

    Args:
        form: 'mse-sum': squares summed over everything, B images counting reference_batch / B (Sparsifiner, stage 1);
            'kl': KL(target || estimate), the estimate's rows made positive and normalised, nats, mean over rows;
            'mass': see `lost_mass`.
        b: keys that a row keeps.
    """
    if form == "mse-sum":
        return (estimate - target).square().sum() * (reference_batch / len(target))
    if form == "mass":
        return lost_mass(estimate, target, b)
    estimate = estimate.clamp_min(SMALLEST)
    estimate = estimate / estimate.sum(-1, keepdim=True)
    return (target * (target.clamp_min(SMALLEST).log() - estimate.log())).sum(-1).mean()


def lost_mass(scores: Tensor, target: Tensor, b: int) -> Tensor:
    """Share of the true attention on keys that scores [..., N] drop, 0 to 1: target [..., N], mean over rows.

    Kept are the b highest. The step is made soft, a logistic function around the b-th score, `SOFTNESS` of the row's
    deviation wide, so that it has a gradient; as the threshold moves with the scores, lifting all of them changes nothing.
    """
    if b >= scores.shape[-1]:
        return (scores * 0).sum()
    threshold = scores.topk(b, dim=-1).values[..., -1:]
    width = (SOFTNESS * scores.detach().std(-1, keepdim=True)).clamp_min(1e-12)
    return 1 - (target * torch.sigmoid((scores - threshold) / width)).sum(-1).mean()
