"""The published results for DeiT-S, drawn beside a sweep, and how their share of the whole model's MACs is derived."""

from __future__ import annotations

from typing import NamedTuple

from sparsify.measure.sweep import Sweep

PUBLISHED_DENSE_MHSA, PUBLISHED_DENSE_GMACS, PUBLISHED_DENSE_TOP1 = 357.66, 4.599, 79.82


class PublishedResult(NamedTuple):
    """A published result for DeiT-S at 224 pixels, fine-tuned. MHSA in the authors' accounting."""

    model: str
    token_keep: float
    keep: float
    mhsa_mmacs: float
    top1: float
    macs_share: float


def _all_tokens(keep: float, mhsa: float, top1: float) -> PublishedResult:
    share = (PUBLISHED_DENSE_GMACS - (PUBLISHED_DENSE_MHSA - mhsa) / 1000) / PUBLISHED_DENSE_GMACS
    return PublishedResult("Sparsifiner", 1, keep, mhsa, top1, share)


def _pruned(model: str, token_keep: float, keep: float, mhsa: float, top1: float, gmacs: float) -> PublishedResult:
    return PublishedResult(model, token_keep, keep, mhsa, top1, gmacs / PUBLISHED_DENSE_GMACS)


_PUBLISHED = (  # Sparsifiner, CVPR 2023: MHSA in M MACs and top-1 on ImageNet's validation set
    _all_tokens(0.9, 396.75, 80.02),
    _all_tokens(0.8, 360.64, 79.97),
    _all_tokens(0.7, 324.57, 79.96),
    _all_tokens(0.6, 290.26, 79.98),
    _all_tokens(0.5, 254.17, 79.94),
    _all_tokens(0.4, 218.01, 79.92),
    _all_tokens(0.3, 183.61, 79.83),
    _all_tokens(0.2, 147.47, 79.71),
    _all_tokens(0.1, 111.37, 79.42),
    _all_tokens(0.05, 93.27, 78.75),
    _all_tokens(0.01, 78.9, 73.03),
    # with tokens pruned the MLPs shrink too: totals by the formula that gives the published MHSA of EViT exactly
    _pruned("EViT", 0.7, 1, 193.1, 79.5, 3.00),
    _pruned("DynamicViT", 0.7, 1, 193.1, 79.3, 3.00),
    _pruned("Sparsif-EViT", 0.7, 0.25, 113.3, 79.5, 2.92),
    _pruned("Sparsifiner", 0.7, 0.25, 113.3, 79.3, 2.92),
    _pruned("EViT", 0.5, 1, 149.1, 78.5, 2.28),
    _pruned("DynamicViT", 0.5, 1, 149.1, 77.3, 2.28),
    _pruned("Sparsif-EViT", 0.5, 0.25, 86.6, 78.7, 2.22),
    _pruned("Sparsifiner", 0.5, 0.25, 86.6, 78.4, 2.22),
)


def published(sweep: Sweep) -> list[PublishedResult]:
    """The paper's figures if they are of the swept model: DeiT-S at 224 pixels with ImageNet's classes and labels.

    The paper gives the attention's MACs alone. Share of the whole model: 1 - (dense MHSA - MHSA) / 4.599 G; where tokens
    are pruned, the total that the same formulae give over 4.599 G.
    """
    deit = sweep.architecture == "deit_small_patch16_224" and sweep.classes == 1000
    return list(_PUBLISHED) if deit and sweep.labelled and sweep.conditions["img_size"] == [224, 224] else []
