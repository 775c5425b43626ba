"""Images that cannot be read, or whose pixels lose something, are told of wherever images are read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import small_runs
from helpers.small_runs import recipe
from sparsify.errors import as_arguments

DEEP = "1 images of 16 bits or floats, scaled to 8 bits"
KINDS = ("calibration", "training", "validation")
UNREAD = "images could not be read and are left out; the first: "


@pytest.fixture
def photographs(tmp_path) -> Path:
    """A data set whose `train` has one image of 16 bits and two that are none, and whose `val` has one that is none."""
    for split, count in (("train", 16), ("val", 10)):
        for i in range(count):
            path = tmp_path / "photos" / split / str(i % 10) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((28, 28), 90).convert("RGB").save(path)
    root = tmp_path / "photos"
    Image.fromarray(np.full((28, 28), 30_000, np.uint16)).save(root / "train" / "1" / "1.png")
    for name in ("train/0/0.png", "train/0/10.png", "val/3/3.png"):
        (root / name).write_text("no image")
    return root


def told(output: Path, chosen, **sources) -> list[str]:
    lines: list[str] = []
    small_runs.convert(output, chosen, say=lines.append, **sources)
    return [line for line in map(as_arguments, lines) if line.partition(" images: ")[0] in KINDS]


def test_of_calibration_once_however_often_its_images_are_read(tmp_path, photographs):
    spread = {"spread_rank": True}  # reads the first of them again
    chosen = recipe(sparsity=spread, calib_images=99)
    unread, lost = told(tmp_path / "m.safetensors", chosen, images=str(photographs))
    assert unread.startswith(f"calibration images: 2 {UNREAD}") and ".png (" in unread
    assert lost == f"calibration images: {DEEP}"


def test_of_what_judges_and_of_what_is_learnt_from(tmp_path, photographs):
    stage = {"steps": 8, "batch_size": 4}  # two epochs
    chosen = recipe(stage, stage, repair={"images": 4})
    lines = told(tmp_path / "m.safetensors", chosen, images=str(photographs), val=str(photographs))
    said = [line.partition(UNREAD)[0] for line in lines if not line.startswith("calibration")]
    assert said == ["validation images: 1 ", "training images: 2 "]
