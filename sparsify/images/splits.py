"""Which folder of a data set is which split, by name, case aside: one rule for calibration, learning and eval."""

from __future__ import annotations

from typing import NamedTuple

from sparsify.images.folders import Tree, joined

NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}
MOST_LEVELS = 8  # folders above the splits


class Splits(NamedTuple):
    """Where the splits of a data set lie; '' where it has none of that name."""

    base: str  # holds the splits, or the images where there are no splits
    train: str = ""
    val: str = ""
    test: str = ""

    @property
    def learn(self) -> str:
        """What is calibrated on and learned from: never more than one split."""
        return self.train or self.val or self.test or self.base

    @property
    def measure(self) -> str:
        """What is measured on: never more than one split."""
        return self.val or self.test or self.train or self.base


def splits_of(tree: Tree) -> Splits:
    """The splits of `tree`. Folders that hold nothing but one folder of folders are passed through.

    One split's name alone is a split if nothing lies beside it, or if it holds folders; `train` beside other folders that
    hold folders is a class of that name, as is any name of a split among folders where it holds only images.
    """
    base = ""
    for _ in range(MOST_LEVELS):
        found, inner = _named(tree, base), _only(tree, base)
        if found or not inner:
            return Splits(base, **{kind: _innermost(tree, at) for kind, at in found.items()})
        base = inner
    return Splits(base)


def _named(tree: Tree, at: str) -> dict[str, str]:
    """The folders in `at` that are splits, by kind."""
    names, found = tree.folders(at), {}
    for kind, known in NAMES.items():
        places = [joined(at, name) for word in known for name in names if name.lower() == word]
        places = [place for place in places if tree.folders(place) or tree.loose(place)]
        if places:
            found[kind] = places[0]
    if len(found) != 1 or len(names) == 1:
        return found
    (kind, place), *_ = found.items()
    beside = any(tree.folders(other) for name in names if (other := joined(at, name)) != place)
    return found if tree.folders(place) and not (kind == "train" and beside) else {}


def _only(tree: Tree, at: str) -> str:
    """The only folder in `at`, if it holds folders and no image lies beside it; else ''."""
    names = tree.folders(at)
    inner = joined(at, names[0]) if len(names) == 1 else ""
    return inner if inner and tree.folders(inner) and not tree.loose(at) else ""


def _innermost(tree: Tree, at: str) -> str:
    for _ in range(MOST_LEVELS):
        at = _only(tree, at) or at
    return at
