"""Which images of a set are taken where only some are asked for: drawn by a seed, spread over what tells them apart."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from itertools import zip_longest

from sparsify.images.folders import Files
from sparsify.images.loaders import Items


def spread(groups: Sequence[Hashable], n: int, seed: int, together: int = 1) -> list[int]:
    """Indices of `n` images (all, if there are fewer), in the listed order, drawn by `seed` evenly from the groups.

    Of two groups that both have images left over, one gives at most `together` images more than the other. A larger `n`
    adds images and takes none away.

    Args:
        groups: of each image.
        together: images that a group gives at a time.
    """
    drawn, members = random.Random(seed), dict[Hashable, list[int]]()
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    every = list(members.values())
    drawn.shuffle(every)
    for each in every:
        drawn.shuffle(each)
    parts = [[each[i : i + together] for i in range(0, len(each), together)] for each in every]
    in_turn = (index for turn in zip_longest(*parts, fillvalue=[]) for part in turn for index in part)
    return sorted(index for index, _ in zip(in_turn, range(n), strict=False))


def groups_of(items: Items) -> Sequence[Hashable]:
    """What the images are spread over: labels, else the folders they lie in; one group where neither is known."""
    if isinstance(items, Files):
        return items.labels or [name.rpartition("/")[0] for name in items.names]
    return getattr(items, "targets", ()) or [None] * len(items)
