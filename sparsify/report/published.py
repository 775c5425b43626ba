"""The published results for DeiT-S (`published.yaml`), drawn beside a sweep."""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple

import yaml

from sparsify.measure.sweep import Sweep

PUBLISHED_DENSE_MHSA, PUBLISHED_DENSE_GMACS, PUBLISHED_DENSE_TOP1 = 357.66, 4.599, 79.82


class PublishedResult(NamedTuple):
    """A published result for DeiT-S at 224 pixels, fine-tuned. MHSA in the authors' accounting."""

    model: str
    token_keep: float
    keep: float
    mhsa_mmacs: float
    top1: float
    macs_share: float  # of the whole model


def published(sweep: Sweep) -> list[PublishedResult]:
    """The paper's figures if they are of the swept model: DeiT-S at 224 pixels with ImageNet's classes and labels.

    The paper gives the attention's MACs alone. Share of the whole model: 1 - (dense MHSA - MHSA) / 4.599 G; where tokens
    are pruned, the total that the same formulae give over 4.599 G.
    """
    deit = sweep.architecture == "deit_small_patch16_224" and sweep.classes == 1000
    if not (deit and sweep.labelled and sweep.conditions["img_size"] == [224, 224]):
        return []
    results = []
    for *figures, mhsa, top1, gmacs in yaml.safe_load(
        (resources.files("sparsify.report") / "published.yaml").read_text()
    ):
        total = PUBLISHED_DENSE_GMACS - (PUBLISHED_DENSE_MHSA - mhsa) / 1000 if gmacs is None else gmacs
        results.append(PublishedResult(*figures, mhsa, top1, total / PUBLISHED_DENSE_GMACS))
    return results
