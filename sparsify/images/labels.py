"""Labels of images: the class is the first folder below the data set's folder or split, and classes have an order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset

from sparsify.errors import BadData
from sparsify.images.folders import Files, in_order

SHOWN = 3  # names in a message


def labelled(files: Files, folders: Sequence[str], num_classes: int | None) -> tuple[Files, list[str]]:
    """The images that lie in class folders, with the labels of a model of `num_classes` outputs (None or 0: features).

    If the model has as many classes as an ImageNet set, folders named by wnid (n01440764), however many, have the class
    index of their wnid. Other folders are numbered in timm's (natural) order of their names.

    Args:
        folders: names of all folders beside `files`; one without images is no class.

    Returns:
        The images, and what to tell the user.

    Raises:
        BadData: no class folders, or another number of classes than the model's.
    """
    place = files.place
    tops = [name.partition("/")[0] if "/" in name else "" for name in files.names]
    outside = tops.count("")
    names = sorted({top for top in tops if top}, key=in_order)
    if not names:
        layout = "labels are taken from folders, PATH/<class>/<image>"
        flat = "the flat ImageNet validation set must first be sorted into folders named by wnid (n01440764, ...)"
        raise BadData(f"{place} holds {outside:,} images but no class folders: {layout}; {flat}")
    notes = [f"{outside} images outside class folders left out"] if outside else []
    empty = sorted({name for name in folders if name not in set(names)})
    if empty:
        notes.append(f"{len(empty)} folders without images are no classes: {_some(empty)}")
    deep = sum(name.count("/") > 1 for name in files.names)
    if deep:
        notes.append(f"{deep:,} images lie in folders of class folders and belong to the class")
    wnids = all(re.fullmatch(r"n\d{8}", name) for name in names)
    subset = infer_imagenet_subset({"num_classes": num_classes}) if wnids and num_classes else None
    if subset:
        order = {wnid: index for index, wnid in enumerate(ImageNetInfo(subset).label_names())}
        unknown = [name for name in names if name not in order]
        if unknown:
            raise BadData(f"{place}: {len(unknown)} folders are no {subset} classes, among them {_some(unknown)}")
        notes.append(f"{len(names)} of {num_classes:,} {subset} classes, mapped by wnid")
    else:
        if num_classes and len(names) != num_classes:
            aside = "".join(f"; {note}" for note in notes)
            raise BadData(f"{place} has {len(names):,} classes, but the model has {num_classes:,}{aside}")
        order = {name: index for index, name in enumerate(names)}
    return files.labelled([order.get(top, -1) for top in tops]), notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
