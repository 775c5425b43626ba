"""The scans of the `digits` data set as (image, label), split into train and test."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load

DATA_FILE = "data.safetensors"
SPLITS = ("train", "test")  # the index of a name is its code in the data file


class Digits:
    """Map-style data set of (image, label): a PIL RGB image of 8 x 8 pixels, or `transform(image)`, and an int 0..9.

    The split is part of the data file: 1,200 train and 597 test images, drawn at random within each class. `folder` is that
    of `data.safetensors`; None: this package.
    """

    classes: tuple[str, ...] = tuple("0123456789")

    def __init__(
        self, split: str = "test", transform: Callable[[Any], Any] | None = None, folder: Path | None = None
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        home = resources.files("sparsify.images.digits") if folder is None else folder
        data = load(home.joinpath(DATA_FILE).read_bytes())
        rows = data["split"] == SPLITS.index(split)
        self.split, self.transform = split, transform
        self.images: np.ndarray = data["images"][rows]  # [N, 8, 8] uint8, 0 (paper) .. 16 (ink)
        self.labels: np.ndarray = data["labels"][rows]  # [N] uint8, 0..9

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        scan = self.images[index].astype("uint16")  # [8, 8]
        image = Image.fromarray((scan * 255 // 16).astype("uint8")).convert("RGB")
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])
