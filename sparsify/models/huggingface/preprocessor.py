"""preprocessor_config.json of transformers -> timm's preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsify.errors import UsageError
from sparsify.models.huggingface.families import Family

FILES = ("preprocessor_config.json", "processor_config.json")  # the first that is there
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers


def preprocessing(tree: Mapping[str, Any], known: Family) -> dict[str, Any]:
    """timm's fields, and `side`, height and width of an image, where the preprocessor says it."""
    nested = tree.get("image_processor")
    tree = nested if isinstance(nested, Mapping) else tree
    mean, std = tree.get("image_mean", known.pixels[0]), tree.get("image_std", known.pixels[1])
    if tree.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = 1.0 if tree.get("do_rescale") is False else tree.get("rescale_factor", 1 / 255)
    if not (_numbers(mean) and _numbers(std) and _numbers((factor,)) and factor > 0):
        raise UsageError("preprocessor_config.json image_mean, image_std, rescale_factor: numbers are expected")
    scale = 255 * factor  # of pixels from 0 to 1
    if abs(scale - 1) < 1e-3:  # 0.00392 is 1 / 255 as well
        scale = 1.0
    found: dict[str, Any] = {"mean": tuple(x / scale for x in mean), "std": tuple(x / scale for x in std)}
    resample = tree.get("resample", 3)
    named = isinstance(resample, int) and 0 <= resample < len(_RESAMPLING)
    found["interpolation"] = _RESAMPLING[resample] if named else "bicubic"
    return found | _cropping(tree)


def _cropping(tree: Mapping[str, Any]) -> dict[str, Any]:
    """How an image is resized and cropped, in timm's words."""
    size, crop = _size(tree.get("size")), _size(tree.get("crop_size"))
    if not tree.get("do_resize", True):
        size = None
    if crop is None or not tree.get("do_center_crop", "crop_size" in tree and isinstance(size, int)):
        crop = None
    if crop is not None:
        height = crop if isinstance(crop, int) else crop[0]
        side = (crop, crop) if isinstance(crop, int) else crop
        if size is None:
            return {"side": side}
        resized, mode = (size, "center") if isinstance(size, int) else (size[0], "squash")
        return {"side": side, "crop_pct": height / resized, "crop_mode": mode}
    if size is None:
        return {}
    if isinstance(size, int):
        return {"side": (size, size), "crop_pct": 1.0, "crop_mode": "center"}
    return {"side": size, "crop_pct": 1.0, "crop_mode": "squash"}


def _size(value: Any) -> int | tuple[int, int] | None:
    """Height and width, or one number, of the shorter edge; None: not said."""
    if isinstance(value, Mapping):
        edges = [value.get(name) for name in ("height", "width")]
        value = value.get("shortest_edge", edges if None not in edges else None)
    sides = value if isinstance(value, list) else [value]
    if not all(isinstance(each, int) and 0 < each <= 1 << 14 for each in sides):
        return None
    return sides[0] if len(sides) == 1 else (sides[0], sides[1]) if len(sides) == 2 else None


def _numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(
        isinstance(each, int | float) and not isinstance(each, bool) and abs(each) <= 1e6 for each in values
    )
