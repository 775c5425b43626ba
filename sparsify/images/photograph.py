"""An image as the model sees it, and where a point of the original lies in that view."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsify.errors import BadData, UsageError, field, one_line, printable
from sparsify.images import datasets
from sparsify.images.decode import decoded

RAMP = 2**22  # pixels at most of the image on which the view's place is measured


class Line(NamedTuple):
    """Along one side, pixel u of the view lies at `start` + `step` u of the original, from the left or top edge."""

    start: float
    step: float


@dataclass(frozen=True)
class Photograph:
    """An image, resized and cropped by the model's evaluation transform."""

    path: Path
    width: int  # of the original, as it is stored, in pixels; so is height
    height: int
    x: Tensor  # the model's input, float32 [C, H, W], normalised
    view: np.ndarray  # the same for display, uint8 [H, W, 3]
    across: Line  # where the view's pixels lie in the original
    down: Line
    losses: tuple[str, ...] = ()  # what its pixels lost (`decode.decoded`)

    @property
    def name(self) -> str:
        """Of the file, fit to be shown (`printable`)."""
        return printable(self.path.name)

    def patch(self, point: ImagePoint, grid: tuple[int, int]) -> int:
        """The number of the patch of `grid` under a point of the original, row by row from the top left.

        `UsageError`: outside the original, or outside the part of it that the model sees.
        """
        (x, y), name = point.pixels(self.width, self.height), self.path.name
        column = _cell(x, self.across, self.view.shape[1], grid[1])
        row = _cell(y, self.down, self.view.shape[0], grid[0])
        outside = f"{field('query')} {point.text}: outside"
        if not (0 <= x <= self.width and 0 <= y <= self.height):
            raise UsageError(f"{outside} {name}, which has {self.width}x{self.height} pixels")
        if column is None or row is None:
            left, right = _ends(self.across, self.view.shape[1], self.width)
            top, bottom = _ends(self.down, self.view.shape[0], self.height)
            sees = f"the part of {name} that the model sees, x {left} to {right} and y {top} to {bottom}"
            raise UsageError(f"{outside} {sees}")
        return row * grid[1] + column


class ImagePoint(NamedTuple):
    """A point of an image: pixels, counted from 0 at the top left, or fractions of width and height; `text` as typed."""

    x: float
    y: float
    shares: bool
    text: str

    def pixels(self, width: int, height: int) -> tuple[float, float]:
        """Distance from the left and top edge of an image of that size; a whole pixel means its middle."""
        return (self.x * width, self.y * height) if self.shares else (self.x + 0.5, self.y + 0.5)


def point(text: str) -> ImagePoint:
    """'120,80': pixels; '0.5,0.25', with a decimal point in both and up to 1: fractions of width and height."""
    parts = [part.strip() for part in text.split(",")]
    pixels = all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts)
    shares = all(re.fullmatch(r"[0-9]?\.[0-9]*", part) and part != "." and float(part) <= 1 for part in parts)
    if len(parts) == 2 and (pixels or shares):
        return ImagePoint(float(parts[0]), float(parts[1]), shares, text)
    form = "X,Y in whole pixels of the image (120,80) or as shares of its sides with a decimal point (0.5,0.25)"
    raise UsageError(f"{field('query')} {text}: {form} is expected")


def read(path: Path, config: dict[str, Any]) -> Photograph:
    """The image of a file as the preprocessing `datasets.data_config` shows it; not rotated, as in eval.

    Raises:
        BadData: missing, a folder, or not an image.
    """
    if os.path.isdir(path):
        raise BadData(f"{path} is a folder: give image files, {path}/*.jpg")
    if not os.path.isfile(path):
        raise BadData(
            f"{path} is no regular file: an image is expected" if os.path.exists(path) else f"no image {path}"
        )
    try:
        image, losses = decoded(path)
    except Exception as error:  # PIL raises a dozen kinds of exception on damaged files
        raise BadData(f"{path} cannot be read as an image: {one_line(error, 100)}") from None
    transform = datasets.transform(config)
    x = transform(image)
    mean, std = (torch.tensor(config[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    view = (x * std + mean).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    across, down = _lines(transform, image.width, image.height)
    return Photograph(path, image.width, image.height, x, np.ascontiguousarray(view), across, down, losses)


def _lines(transform: Callable[[Image.Image], Tensor], width: int, height: int) -> tuple[Line, Line]:
    """Where the view's pixels lie in an original of that size, measured on a ramp.

    The steps of the transform from image to image (resize, crop, pad) are applied to an image whose red and green hold the
    position of each pixel; straight lines are fitted to the result. Blue distinguishes the image from padding. A large
    original is represented by a smaller one of its shape.
    """
    times = max(1.0, math.sqrt(width * height / RAMP))
    columns, rows = (max(1, round(side / times)) for side in (width, height))
    x, y = (np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows
    ramp = np.full((rows, columns, 3), 255, dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.rint(255 * x)[None], np.rint(255 * y)[:, None]
    image = Image.fromarray(ramp)
    for step in getattr(transform, "transforms", ()):
        output = step(image)
        if not isinstance(output, Image.Image):
            break
        image = output
    seen = np.asarray(image).astype(float)
    row, column = seen[seen.shape[0] // 2], seen[:, seen.shape[1] // 2]  # through the middle
    return _fit(row[:, 0], row[:, 2], width), _fit(column[:, 1], column[:, 2], height)


def _cell(at: float, line: Line, pixels: int, patches: int) -> int | None:
    """Which of `patches` along a side of the view holds the position `at` of the original; None: outside the view."""
    share = (at - line.start) / line.step / pixels
    return min(patches - 1, int(share * patches)) if 0 <= share <= 1 else None


def _fit(ramp: np.ndarray, inside: np.ndarray, side: int) -> Line:
    """The line through the positions that a row of pixels holds, 0 to 255 over `side` pixels of the original."""
    valid = (inside > 250) & (ramp > 1) & (ramp < 254)  # resizing bends the ramp at its ends
    at = np.arange(len(ramp))[valid] + 0.5
    if len(at) < 2 or np.ptp(ramp[valid]) == 0:
        return Line(0.0, side / len(ramp))
    step, start = np.polyfit(at, ramp[valid] / 255 * side, 1)
    return Line(float(start), float(step))


def _ends(line: Line, pixels: int, side: int) -> tuple[int, int]:
    """First and last pixel of the original that the view shows."""
    return max(0, round(line.start)), min(side, round(line.start + line.step * pixels)) - 1
