"""Claims about picture files as RGB of 8 bits: the pixels are right or there are none, and what is lost is said."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsify.errors import BadData
from sparsify.images import datasets
from sparsify.images.decode import CLEAR, DEEP, TURNED, decoded

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(path: Path, image: Image.Image | np.ndarray, **options) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def turned(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png(path: Path, width: int, height: int) -> Path:
    """A grey PNG of any size, almost empty as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\0\0\0\0"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path, suffix):
    image, losses = decoded(saved(tmp_path / f"x{suffix}", RAMP.astype(np.uint16) * 257))
    assert np.array_equal(np.asarray(image), np.stack([RAMP] * 3, 2)) and losses == (DEEP,)


def test_sixteen_bits_are_rounded(tmp_path):
    values = np.array([[0, 128, 129, 65406, 65407, 65535]], dtype=np.uint16)  # 128 / 257 < 0.5 < 129 / 257
    image, _ = decoded(saved(tmp_path / "x.tif", values))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]


def test_floats_from_0_to_1_are_scaled_and_others_refused(tmp_path):
    image, losses = decoded(saved(tmp_path / "x.tif", RAMP.astype(np.float32) / 255))
    assert np.array_equal(np.asarray(image), np.stack([RAMP] * 3, 2)) and losses == (DEEP,)
    for values in (RAMP.astype(np.float32), -RAMP.astype(np.float32) / 255, np.full((2, 2), np.nan, np.float32)):
        with pytest.raises(ValueError, match="0 to 1 is expected"):
            decoded(saved(tmp_path / "y.tif", values))
    with pytest.raises(ValueError, match="32 bits"):
        decoded(saved(tmp_path / "z.tif", RAMP.astype(np.int32)))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pixels_are_those_that_timm_reads(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8))
    for mode in {".png": ("RGB", "L", "P", "RGBA", "LA", "1"), ".jpg": ("RGB", "L", "CMYK"), ".webp": ("RGB", "RGBA")}[
        suffix
    ]:
        path = saved(tmp_path / f"{mode}{suffix}", noise.convert(mode), exif=turned() if mode == "RGB" else b"")
        with Image.open(path) as file:
            expected = np.asarray(file.convert("RGB"))
        image, losses = decoded(path)
        assert np.array_equal(np.asarray(image), expected) and losses == ((TURNED,) if mode == "RGB" else ())


def test_transparency_is_said_where_something_is_transparent(tmp_path):
    image = Image.fromarray(np.dstack([RAMP] * 3)).convert("RGBA")
    assert decoded(saved(tmp_path / "opaque.png", image))[1] == ()
    image.putpixel((3, 3), (9, 9, 9, 254))
    assert decoded(saved(tmp_path / "clear.png", image))[1] == (CLEAR,)
    palette = image.convert("RGB").quantize(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(saved(tmp_path / "p.png", palette, transparency=bytes([0, *[255] * 7])))[1] == (CLEAR,)
        assert decoded(saved(tmp_path / "rgb.png", image.convert("RGB"), transparency=(1, 1, 1)))[1] == (CLEAR,)


def test_upright_pictures_lose_nothing(tmp_path):
    for orientation in (1, 0, 9):
        assert decoded(saved(tmp_path / "x.jpg", RAMP, exif=turned(orientation)))[1] == ()
    assert decoded(saved(tmp_path / "x.jpg", RAMP, exif=b"Exif\0\0no directory"))[1] == ()


@pytest.mark.parametrize("size, words", [((13_300, 13_300), "exceeds limit"), ((2, 401), "over 200 times")])
def test_pictures_of_huge_size_or_shape_are_refused_before_they_are_read(tmp_path, size, words):
    with pytest.raises((ValueError, Warning), match=words):
        decoded(png(tmp_path / "x.png", *size))


def test_counts_reach_the_loader_with_and_without_workers(tmp_path):
    for c in "ab":
        (tmp_path / c).mkdir()
        saved(tmp_path / c / "deep.png", RAMP.astype(np.uint16))
        saved(tmp_path / c / "plain.png", RAMP)
    saved(tmp_path / "a" / "turned.jpg", RAMP, exif=turned(3))
    png(tmp_path / "a" / "huge.png", 13_300, 13_300)
    to = datasets.transform({"input_size": (3, 8, 8), "interpolation": "bilinear", "crop_pct": 1.0})
    for workers in (0, 1):
        loader = datasets.labelled(tmp_path, 2, to, 2, workers)
        for _ in range(2):  # each pass counts anew
            assert sum(len(labels) for _, labels in loader) == 5
            assert loader.flaws.lost == {DEEP: 2, TURNED: 1} and loader.flaws.broken == 1
            assert "huge.png" in loader.flaws.first_broken and "exceeds limit" in loader.flaws.first_broken
    with pytest.raises(BadData, match="cannot read a/huge.png"):
        list(datasets.labelled(tmp_path, 2, to, strict=True))
