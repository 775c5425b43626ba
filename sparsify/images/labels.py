"""Labels of images: the class is the first folder below the data set's folder or split, and classes have an order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch.utils.data import IterableDataset

from sparsify.errors import BadLabels, field
from sparsify.images.folders import Files, in_order
from sparsify.images.loaders import Items

SHOWN = 3  # names in a message
BY_NAME = "classes, by the names that the model has"


def labelled(
    files: Files, folders: Sequence[str], num_classes: int | None, known: Sequence[str] = ()
) -> tuple[Files, list[str]]:
    """The images that lie in class folders, with the labels of a model of `num_classes` outputs (None or 0: features).

    Folders that are all named as classes of the model have those. If the model has as many classes as an ImageNet set,
    folders named by wnid (n01440764), however many, have the class index of their wnid. Other folders are numbered in timm's
    (natural) order of their names.

    Args:
        folders: names of all folders beside `files`; one without images is no class.
        known: names of all classes of the model in their order; none: it does not know them.

    Returns:
        The images, and what to tell the user.

    Raises:
        BadLabels: no class folders, or another number of classes than the model's.
    """
    place = files.place
    tops = [name.partition("/")[0] if "/" in name else "" for name in files.names]
    outside = tops.count("")
    names = sorted({top for top in tops if top}, key=in_order)
    if not names:
        layout = "labels are taken from folders, PATH/<class>/<image>"
        flat = "the flat ImageNet validation set must first be sorted into folders named by wnid (n01440764, ...)"
        raise BadLabels(f"{place} holds {outside:,} images but no class folders: {layout}; {flat}")
    notes = [f"{outside} images outside class folders left out"] if outside else []
    empty = sorted({name for name in folders if name not in set(names)})
    if empty:
        notes.append(f"{len(empty)} folders without images are no classes: {_some(empty)}")
    deep = sum(name.count("/") > 1 for name in files.names)
    if deep:
        notes.append(f"{deep:,} images lie in folders of class folders and belong to the class")
    wnids = all(re.fullmatch(r"n\d{8}", name) for name in names)
    subset = infer_imagenet_subset({"num_classes": num_classes}) if wnids and num_classes else None
    by_name = _by_name(names, known if num_classes else (), place, "folders")
    if by_name is not None:
        order = by_name
        notes.append(f"{len(names)} of {num_classes:,} {BY_NAME}")
    elif subset:
        order = {wnid: index for index, wnid in enumerate(ImageNetInfo(subset).label_names())}
        unknown = [name for name in names if name not in order]
        if unknown:
            raise BadLabels(f"{place}: {len(unknown)} folders are no {subset} classes, among them {_some(unknown)}")
        notes.append(f"{len(names)} of {num_classes:,} {subset} classes, mapped by wnid")
    else:
        if num_classes and len(names) != num_classes:
            aside = "".join(f"; {note}" for note in notes)
            raise BadLabels(f"{place} has {len(names):,} classes, but the model has {num_classes:,}{aside}")
        order = {name: index for index, name in enumerate(names)}
        if known and num_classes:
            notes.append(f"no folder has the name of a class of the model ({_some(known)})")
        differ = [pair for pair in zip(names, sorted(names), strict=True) if pair[0] != pair[1]]
        if differ and num_classes:
            natural, text = differ[0]
            rule = f"classes are numbered in natural order, as by timm ({natural} before {text}), not by letter, as by"
            notes.append(f"{rule} torchvision: {field('class_map')} FILE gives another order")
    return files.labelled([order.get(top, -1) for top in tops]), notes


class Renumbered:
    """The images of `items`, each label the number in `order` at its place."""

    def __init__(self, items: Items, order: Sequence[int]) -> None:
        self.items, self.order = items, order

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, index: int) -> tuple[Any, int]:
        image, label = self.items.fetch(index)
        return image, self.order[label] if 0 <= label < len(self.order) else -1

    def name(self, index: int) -> str:
        return self.items.name(index)

    @property
    def targets(self) -> Sequence[str]:
        """As of `Mapped`."""
        return getattr(self.items, "targets", ())


def of_dataset(
    items: Items | IterableDataset,
    name: str,
    classes: Sequence[str],
    num_classes: int | None,
    known: Sequence[str] = (),
) -> tuple[Items | IterableDataset, str]:
    """The images of the data set `name` with the model's labels, and what to tell the user; see `labelled`.

    Classes that are all named as classes of the model have those; others keep the data set's numbers.

    Args:
        classes: the names of the data set's classes by its numbers; none: not known, as of a stream.
    """
    known = known if num_classes else ()
    order = _by_name(classes, known, name, "classes")
    if order is not None:
        renumbered = Renumbered(cast(Items, items), [order[each] for each in classes])
        return renumbered, f"{len(classes)} of {num_classes:,} {BY_NAME}"
    if num_classes and classes and len(classes) != num_classes:
        raise BadLabels(f"{name} has {len(classes):,} classes, but the model has {num_classes:,}")
    own = f"labels are the data set's own numbers: it names no class as the model does ({_some(known)})"
    return items, own if known else ""


def _by_name(names: Sequence[str], known: Sequence[str], place: str, what: str) -> dict[str, int] | None:
    """Numbers of the model's classes `known`, if `names` are among them; None: none of them is."""
    order = {name: index for index, name in enumerate(known)}
    strange = [name for name in names if name not in order]
    if len(strange) == len(names):
        return None
    if strange:
        raise BadLabels(f"{place}: {len(strange)} {what} are not classes of the model, among them {_some(strange)}")
    return order


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
