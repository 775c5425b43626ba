"""Where a point of a picture lies in what the model sees of it."""

import os
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sparsify.errors import BadData, UsageError
from sparsify.images import decode, photograph

CONFIG = dict(
    input_size=(3, 96, 96), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", crop_pct=0.9,
    crop_mode="center",
)  # fmt: skip


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(320, 240), (100, 300), (40, 40), (900, 300)])
@pytest.mark.parametrize("sides", [(96, 96), (64, 96)])
def test_a_mark_is_found_where_the_transform_puts_it(mode, size, sides, tmp_path):
    draw = random.Random(f"{mode}{size}{sides}")
    image, (w, h) = Image.new("RGB", size), size
    x, y = int(w * draw.uniform(0.4, 0.6)), int(h * draw.uniform(0.4, 0.6))
    r = max(2, min(size) // 16)
    ImageDraw.Draw(image).rectangle((x - r, y - r, x + r, y + r), fill="white")
    image.save(tmp_path / "mark.png")
    photo = photograph.read(tmp_path / "mark.png", CONFIG | dict(crop_mode=mode, input_size=(3, *sides)))
    assert photo.x.shape == (3, *sides) and photo.view.shape == (*sides, 3) and photo.view.dtype == np.uint8
    bright = photo.view.astype(float).mean(2)
    bright[np.abs(bright - 127) < 4] = 0  # padding
    rows, columns = np.mgrid[: sides[0], : sides[1]] + 0.5
    centre = (columns * bright).sum() / bright.sum(), (rows * bright).sum() / bright.sum()
    assert (x + 0.5 - photo.across.start) / photo.across.step == pytest.approx(centre[0], abs=0.5)
    assert (y + 0.5 - photo.down.start) / photo.down.step == pytest.approx(centre[1], abs=0.5)
    grid = (sides[0] // 8, sides[1] // 8)
    point = photograph.point(f"{x},{y}")
    row, column = divmod(photo.patch(point, grid), grid[1])
    assert abs(centre[0] - 8 * (column + 0.5)) <= 4.5 and abs(centre[1] - 8 * (row + 0.5)) <= 4.5
    shares = photograph.ImagePoint((x + 0.5) / w, (y + 0.5) / h, True, "")
    assert photo.patch(shares, grid) == photo.patch(point, grid)


def test_pixels_and_shares_are_told_apart():
    assert photograph.point("120,80")[:3] == (120, 80, False) and photograph.point("1,0")[:3] == (1, 0, False)
    assert photograph.point("0.5, .25")[:3] == (0.5, 0.25, True) and photograph.point("1.0,0.")[:3] == (1, 0, True)
    for text in ("", "5", "1,2,3", "0.5,80", "1.5,0.5", "-1,3", "a,b", "nan,0.5", "1e3,5", ".,.", "٣,٤"):
        with pytest.raises(UsageError, match="whole pixels"):
            photograph.point(text)


def test_a_point_that_the_model_does_not_see_is_refused(tmp_path):
    Image.new("RGB", (300, 100)).save(tmp_path / "wide.png")
    photo = photograph.read(tmp_path / "wide.png", CONFIG)
    with pytest.raises(UsageError, match="300x100"):
        photo.patch(photograph.point("300,50"), (6, 6))
    with pytest.raises(UsageError, match=r"x 10\d to 19\d and y [4-6] to 9\d"):
        photo.patch(photograph.point("20,50"), (6, 6))
    assert photo.patch(photograph.point("150,50"), (6, 6)) == 21
    assert photo.patch(photograph.point("0.5,0.5"), (6, 6)) in (14, 15, 20, 21)


def test_pictures_are_not_rotated_as_in_eval(tmp_path):
    image = Image.new("RGB", (60, 40), "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    photo = photograph.read(tmp_path / "turned.png", CONFIG)
    assert (photo.width, photo.height) == (60, 40) and photo.losses == (decode.TURNED,)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_place_of_the_view_is_the_same_on_a_smaller_picture_of_the_shape(mode, monkeypatch):
    transform = photograph.datasets.transform(CONFIG | dict(crop_mode=mode))
    whole = photograph._lines(transform, 1500, 1000)
    monkeypatch.setattr(photograph, "RAMP", 1500 * 1000 / 7)
    smaller = photograph._lines(transform, 1500, 1000)
    for line, other in zip(whole, smaller, strict=True):
        assert other.start == pytest.approx(line.start, abs=2) and other.step == pytest.approx(line.step, rel=0.01)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    os.mkfifo(tmp_path / "pipe.jpg")
    named = {"": "folder", "none.jpg": "no image", "text.jpg": "text.jpg", "pipe.jpg": "no regular file"}
    for path, words in ((tmp_path / name, words) for name, words in named.items()):
        with pytest.raises(BadData, match=words):
            photograph.read(path, CONFIG)
