"""MHSA as Sparsifiner's authors count it, to compare with their tables; not what our models execute.

Derived from the published figures of DeiT-S, embed dimension D = H d, N0 tokens of which P are prefix tokens (theirs: 1).
With M patch tokens active in a block's attention, and b = ceil(keep N0) whatever M is, one block counts

    dense attention       2 D N0^2                          all patches active
                          2 D (P N0 + M^2)                  tokens were dropped: the cls row still attends to all N0
    sparse attention      2 D (P N0 + (N0 - P) b)           all patches active
                          2 D (P N0 + M min(b, M))          tokens were dropped
    its predictor         2 N r D + H (N - P) N kappa       N = M + P, r = 32, kappa = 5.53 coefficients kept in a row

The predictor is the paper's (Fig. 2, no projection of the channels), whichever one the model has. If all tokens remain,
this is 1.806336 b + 75.29 M, the paper's sweep over keep being 1.806336 b + 75.26 M (+-0.08). With 0.7 or 0.5 of the tokens
kept at each of three stages, dense attention is theirs to the unit: 193,089,792 and 149,051,136. With keep 0.25 as well,
112.7 M and 87.7 M stand against the published 113.3 M and 86.6 M (-0.5 %, +1.3 %): the predictor is assumed to
score the remaining tokens only; over all N0 in every block the figures would be 137.7 M and 123.2 M. The paper has no tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sparsify.nn.attention import GraftedAttention, SparseAttention

RANK = 32  # r, rows of W_down
KAPPA = 5.53  # coefficients kept in a row of A~_down, a mean


class Mhsa(NamedTuple):
    """MACs of the attention of all blocks, projections excluded; per image."""

    dense: int
    sparse: int


def count(attention: Sequence[GraftedAttention], tokens: Sequence[int], prefix: int) -> Mhsa:
    """The authors' MHSA of a model and of its dense original: every block's attention, N tokens into it, and P."""
    dense, sparse, full = 0, 0.0, tokens[0]
    for module, N in zip(attention, tokens, strict=True):
        H, D = module.num_heads, module.num_heads * module.head_dim
        dense += 2 * D * full * full
        rows = N - prefix
        most = full if full == N else rows  # keys of a row
        kept: float = most
        if isinstance(module, SparseAttention):
            keeps = module.sparsity.keeps
            kept = sum(min(most, max(1, math.ceil(keep * full - 1e-9))) for keep in keeps) / len(keeps)
            sparse += 2 * N * RANK * D + H * rows * N * KAPPA
        sparse += 2 * D * (prefix * full + rows * kept)
    return Mhsa(dense, round(sparse))
