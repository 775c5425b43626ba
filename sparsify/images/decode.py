"""A picture file -> RGB of 8 bits. What a picture loses by that is named; what cannot be shown rightly is refused."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from PIL import Image

DEEP = "of 16 bits or floats, scaled to 8 bits"
CLEAR = "with transparency, which is dropped"
TURNED = "with an EXIF rotation, which is not applied, as in timm"
LONGEST = 200  # times the shorter side: a resize to the model's size would make it huge
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


def decoded(file: Any) -> tuple[Image.Image, tuple[str, ...]]:
    """The RGB image of a path, open file or PIL image, and what it loses (`DEEP`, `CLEAR`, `TURNED`).

    16 bits are divided by 257, floats from 0 to 1 multiplied by 255.

    Raises:
        Exception: a dozen kinds of PIL's on damaged files; also more pixels than PIL allows (89 million), a side over 200
            times the other, floats outside 0 to 1, and integers of 32 bits.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PIL's on odd tags
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return _decoded(file if isinstance(file, Image.Image) else Image.open(file))


def _decoded(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{image.width}x{image.height} pixels: one side is over {LONGEST} times the other")
    image.load()
    losses, upright = [], 1
    with contextlib.suppress(Exception):  # EXIF data that cannot be read turns nothing
        upright = image.getexif().get(_ORIENTATION, 1)
    if image.mode[0] in "IF":
        losses.append(DEEP)
        image = Image.fromarray(_eight_bits(np.asarray(image), image.format))
    elif image.has_transparency_data:
        bands = image if "A" in image.getbands() else image.convert("RGBA")
        if cast(tuple[int, int], bands.getchannel("A").getextrema())[0] < 255:
            losses.append(CLEAR)
    if upright in range(2, 9):
        losses.append(TURNED)
    return image.convert("RGB"), tuple(losses)


def lost(counts: Mapping[str, int]) -> str:
    """How many images lost what, in words; '' if none did."""
    return ", ".join(f"{n:,} images {loss}" for loss, n in sorted(counts.items()))


def _eight_bits(values: np.ndarray, form: str | None) -> np.ndarray:
    """Grey values of PIL's modes I;16, I and F in 8 bits."""
    low, high = values.min(), values.max()
    whole = values.dtype.kind != "f"
    if not whole and not (low >= 0 and high <= 1):  # not a number is outside too
        raise ValueError(f"floats from {low:g} to {high:g}: 0 to 1 is expected")
    if whole and values.dtype.itemsize > 2 and not (form == "PNG" and low >= 0 and high < 2**16):  # of older Pillow
        raise ValueError("integers of 32 bits, whose range is not known: 8 or 16 bits, or floats, are expected")
    scale = np.float32(1 / 257 if whole else 255)
    parts = np.array_split(values, max(1, values.size >> 20))  # of a megapixel, for the memory
    return np.concatenate([np.rint(part * scale).astype(np.uint8) for part in parts])
