"""Labels of images: the class is the first folder below the data set's folder or split, and classes have an order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset

from sparsify.errors import BadData, field
from sparsify.images.folders import Files, in_order

SHOWN = 3  # names in a message


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
    by_name = {name: index for index, name in enumerate(known if num_classes else ())}
    strange = [name for name in names if name not in by_name]
    if by_name and len(strange) < len(names):
        if strange:
            raise BadData(f"{place}: {len(strange)} folders are no classes of the model, among them {_some(strange)}")
        order = by_name
        notes.append(f"{len(names)} of {num_classes:,} classes, by the names that the model has")
    elif subset:
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
        if known and num_classes:
            notes.append(f"no folder has the name of a class of the model ({_some(known)})")
        differ = [pair for pair in zip(names, sorted(names), strict=True) if pair[0] != pair[1]]
        if differ and num_classes:
            natural, text = differ[0]
            rule = f"classes are numbered in natural order, as by timm ({natural} before {text}), not by letter, as by"
            notes.append(f"{rule} torchvision: {field('class_map')} FILE gives another order")
    return files.labelled([order.get(top, -1) for top in tops]), notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
