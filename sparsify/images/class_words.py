"""What the classes of a model are called, in words."""

from __future__ import annotations

import re

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from sparsify.errors import field
from sparsify.images.preprocessing import class_names


def class_words(model: nn.Module) -> tuple[tuple[str, ...], str]:
    """The words of the classes in their order, or none where they are not known; and a line for the user, or ''.

    A model without names that has as many classes as an ImageNet set has that set's. wnids (n01440764) become words.
    """
    names, classes = class_names(model), int(getattr(model, "num_classes", 0))
    subset, note = infer_imagenet_subset({"num_classes": classes}), ""
    if not names and subset is not None:
        names = tuple(ImageNetInfo(subset).label_names())
        note = f"names are those of {subset}, which has {classes:,} classes too: {field('class_map')} gives others"
    elif not names and classes > 1:
        note = f"the model does not know the names of its classes: {field('class_map')} gives them"
    if names and all(re.fullmatch(r"n\d{8}", name) for name in names):
        words = ImageNetInfo("imagenet-1k")
        return tuple(_words(words, name) for name in names), note
    return names, note


def _words(info: ImageNetInfo, wnid: str) -> str:
    try:
        return info.label_name_to_description(wnid)
    except KeyError:
        return wnid
