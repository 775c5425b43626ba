"""Folders of small images, by class."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def class_folders(root: Path, classes: Iterable[str], images: int = 1) -> Path:
    """ROOT/CLASS/0.png, ...: `images` for each class; returns ROOT."""
    for c in classes:
        (root / c).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (8, 8), (30 * i, 90, 9)).save(root / c / f"{i}.png")
    return root
