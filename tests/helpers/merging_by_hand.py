"""Merging and ranking of tokens as plain loops over one image, from the docstrings of `sparsify.nn.tokens`."""

from __future__ import annotations

import torch

from sparsify.nn.merging import rounds


def matched_by_hand(x, I, m):
    """`matching` of one image, x [n, C] and I [n]: which tokens go on, and for every token the one it goes into."""
    n = len(x)
    order = sorted(range(n), key=lambda j: (float(I[j]), j))
    cosine = torch.nn.functional.cosine_similarity(x[:, None].double(), x[None].double(), dim=-1)
    looking = order[: min(n - 1, 2 * (n - m))]
    nearest = {j: max(order[p + 1 :], key=lambda k, j=j: (float(cosine[j, k]), -k)) for p, j in enumerate(looking)}
    gone = sorted(looking, key=lambda j: (1 - float(cosine[j, nearest[j]])) * float(I[j]))[: n - m]

    def root(j):
        return root(nearest[j]) if j in gone else j

    return [j for j in range(n) if j not in gone], [root(j) for j in range(n)]


def merged_by_hand(x, I, m):
    """A merging of one image from n tokens to m: who goes on, and for every token the one it goes into in the end.

    Every round's tokens are the means of all that went into them, computed anew from the n.
    """
    there, into = list(range(len(x))), list(range(len(x)))
    for left in rounds(len(x), m):
        groups = [[j for j in range(len(x)) if into[j] == root] for root in there]
        means = torch.stack([(I[g, None] * x[g]).sum(0) / I[g].sum() for g in groups])
        keep, target = matched_by_hand(means, torch.stack([I[g].sum() for g in groups]), left)
        goes = {root: there[target[i]] for i, root in enumerate(there)}
        there, into = [there[i] for i in keep], [goes[root] for root in into]
    return there, into


def ranked_by_hand(I, m, fuse):
    """`ranking` of one image."""
    order = sorted(range(len(I)), key=lambda j: (-float(I[j]), j))
    into = [j if j in order[:m] else order[m] if fuse else None for j in range(len(I))]
    return sorted(order[: m + fuse]), into
