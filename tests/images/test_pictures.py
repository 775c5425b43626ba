"""Claims about the built-in calibration pictures."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest

from sparsify.images.pictures import pictures
from sparsify.images.pictures.pictures import CalibrationImages

FOLDER = resources.files("sparsify.images.pictures")


def test_every_photograph_is_shipped_small_and_credited():
    files = sorted(p.name for p in FOLDER.iterdir() if p.name.endswith(".jpg"))
    assert files == [f"{name}.jpg" for name in pictures.PHOTOGRAPHS]
    assert sum(len((FOLDER / name).read_bytes()) for name in files) < 400_000
    notice = (FOLDER / "NOTICE.md").read_text(encoding="utf-8")
    for row in (line for line in notice.splitlines() if line.startswith("| `")):
        assert any(word in row for word in ("CC0", "CC BY 2.0", "public domain"))
    assert all(f"`{name}`" in notice for name in files)


def test_pictures_are_rgb_squares_made_when_asked_for():
    made = CalibrationImages(10**6)
    assert len(made) == 10**6
    picture = made[999_999]
    assert picture.mode == "RGB" and picture.size == (pictures.SIDE, pictures.SIDE)
    with pytest.raises(IndexError):
        made[10**6]


def test_same_seed_same_pictures_and_a_longer_list_begins_with_the_shorter():
    short, long = CalibrationImages(4, 3), CalibrationImages(12, 3)
    assert [p.tobytes() for p in short] == [p.tobytes() for p in long[:4]]
    assert short[0].tobytes() == short[0].tobytes()
    assert CalibrationImages(4, 4)[0].tobytes() != short[0].tobytes()


def test_no_two_pictures_are_the_same():
    assert len({p.tobytes() for p in CalibrationImages(40)}) == 40


def test_share_of_collages_is_kept_in_any_range(monkeypatch):
    monkeypatch.setattr(pictures, "_collage", lambda draw: "collage")
    monkeypatch.setattr(pictures, "_crop", lambda *args: "crop")
    for share in (0.0, 0.25, 0.5, 1.0):
        made = CalibrationImages(64, 0, share)
        assert abs(sum(p == "collage" for p in made) - 64 * share) <= 2


def test_every_photograph_is_used_by_crops(monkeypatch):
    monkeypatch.setattr(pictures, "_crop", lambda name, *args: name)
    monkeypatch.setattr(pictures, "_collage", lambda draw: "collage")
    assert set(CalibrationImages(40)) == {*pictures.PHOTOGRAPHS, "collage"}


def test_pictures_have_the_contrast_of_photographs():
    for picture in CalibrationImages(12):
        deviation = np.asarray(picture).std()
        assert 15 < deviation < 110  # uniform noise over 0..255 has 74, a flat picture 0
