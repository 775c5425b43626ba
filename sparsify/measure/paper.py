"""MHSA as Sparsifiner's authors count it, for their tables; not what a model of ours executes.

Worked out from the published figures of DeiT-S, embed dimension D = H d, N0 tokens of which P are prefix tokens (theirs: 1).
With M patch tokens active in a block's attention, and b = ceil(keep N0) whatever M is, one block counts

    dense attention       2 D N0^2                          all patches active
                          2 D (P N0 + M^2)                  tokens have left: the cls row still meets all N0 tokens
    sparse attention      2 D (P N0 + (N0 - P) b)           all patches active
                          2 D (P N0 + M min(b, M))          tokens have left
    its predictor         2 N r D + H (N - P) N kappa       N = M + P, r = 32, kappa = 5.53 coefficients left in a row

The predictor is the paper's (Fig. 2, no projection of the channels), whichever one the model has. Where all tokens stay,
this is 1.806336 b + 75.29 M, the paper's sweep over keep being 1.806336 b + 75.26 M (+-0.08). With 0.7 or 0.5 of the tokens
kept at each of three stages, dense attention is theirs to the unit: 193,089,792 and 149,051,136. With keep 0.25 besides,
112.7 M and 87.7 M stand against the published 113.3 M and 86.6 M (-0.5 %, +1.3 %): the predictor is read with the tokens
that are left in its rows and columns; with all N0 in every block it would be 137.7 M and 123.2 M. There
is no tail: the paper has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sparsify.nn.attention import GraftedAttention, SparseAttention

RANK = 32  # r, rows of W_down
KAPPA = 5.53  # coefficients left in a row of A~_down, a mean


class Mhsa(NamedTuple):
    """MACs of the attention of all blocks, projections excluded; per image."""

    dense: int
    sparse: int


def count(attention: Sequence[GraftedAttention], tokens: Sequence[int], prefix: int) -> Mhsa:
    """The authors' MHSA of a model and of its dense original.

    Args:
        attention: of every block.
        tokens: N into the attention of every block, prefix included.
        prefix: P.
    """
    dense, sparse, full = 0, 0.0, tokens[0]
    for module, N in zip(attention, tokens, strict=True):
        H, D = module.num_heads, module.num_heads * module.head_dim
        dense += 2 * D * full * full
        rows = N - prefix
        kept = most = full if full == N else rows  # keys of a row
        if isinstance(module, SparseAttention):
            kept = min(most, max(1, math.ceil(module.sparsity.keep * full - 1e-9)))
            sparse += 2 * N * RANK * D + H * rows * N * KAPPA
        sparse += 2 * D * (prefix * full + rows * kept)
    return Mhsa(dense, round(sparse))
