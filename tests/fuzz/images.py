"""Pictures and sets of them: damaged files of each format, odd modes and sizes, archives, and trees that link in circles."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fuzz.harness import Case, Fault
from sparsify.images import datasets, photograph
from sparsify.images.trainset import trainset

SUITE, MANY = 100, 500

CONFIG = {"input_size": (3, 28, 28), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
CONFIG |= {"crop_pct": 0.9, "crop_mode": "center"}
FORMATS = {".jpg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".gif": "GIF", ".webp": "WEBP", ".bmp": "BMP", ".ppm": "PPM"}
MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "I", "F", "YCbCr")
NAMES = (
    "train",
    "Train",
    "val",
    "VALID",
    "test",
    "Testing",
    "a",
    "b",
    "0",
    "10",
    "2",
    ".git",
    "x y",
    "n01440764",
    "é",
    "\x1b[2J",
)


def cases(seed: int, folder: Path) -> Iterator[Case]:
    draw, number = random.Random(seed), 0
    while True:
        place = folder / str(number)
        kind, make = draw.choice((("picture", _picture), ("archive", _archive), ("tree", _tree)))
        yield Case(kind, str(number), _run(make, random.Random(draw.random()), place))
        shutil.rmtree(place, ignore_errors=True)
        number += 1


def _run(make: Callable[[random.Random, Path], Path], draw: random.Random, place: Path) -> Callable[[], object]:
    def run() -> None:
        place.mkdir(parents=True)
        _read(draw, make(draw, place))

    return run


def _read(draw: random.Random, path: Path) -> None:
    """Through one of the ways that images are read."""
    to = datasets.transform(CONFIG)
    way = draw.randrange(4)
    if path.is_file() and path.suffix != ".tar":
        if way == 3:
            photograph.read(path, CONFIG)
            return
        path = path.parent.parent
    if way == 0:
        batches = [x for x, _ in datasets.labelled(path, 0, to, 4)]
    elif way == 1:
        batches = list(trainset(path, None, draw.random() < 0.3, 0, draw.choice((0.0, 0.5))).calibration(5, 0, to))
    elif way == 2:
        batches = [x for x, _ in datasets.labelled(path, draw.choice((1, 1, 2, 3)), to, 4)]
    else:
        loader = datasets.labelled(path, None, to, 4, strict=True)
        batches = [x for x, _ in loader]
    if not all(np.isfinite(x.numpy()).all() for x in batches):
        raise Fault("pixels that are not finite")


def _bytes(draw: random.Random, suffix: str, size: tuple[int, int] | None = None) -> bytes:
    """A picture, damaged or not."""
    width, height = size or draw.choice(((1, 1), (8, 6), (40, 30), (1, 300), (1000, 3), (64, 2000)))
    mode, made = draw.choice(MODES), io.BytesIO()
    noise = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (height, width, 3), np.uint8)
    try:
        image = Image.fromarray(noise)
        if mode in ("I;16", "I", "F"):
            scale = {"I;16": 257, "I": draw.choice((1, 70_000)), "F": draw.choice((1, 1 / 255, np.nan))}[mode]
            kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
            image = Image.fromarray((noise[..., 0].astype(float) * scale).astype(kind))
        exif = Image.Exif()
        exif[0x0112] = draw.choice((1, 3, 6, 8, 99))
        (image if mode in ("I;16", "I", "F") else image.convert(mode)).save(made, FORMATS[suffix], exif=exif)
    except (OSError, ValueError):  # a format that does not hold this mode
        Image.fromarray(noise).save(made, FORMATS[suffix])
    data = bytearray(made.getvalue())
    for _ in range(draw.choice((0, 0, 1, 3, 30))):
        at = draw.randrange(len(data))
        what = draw.randrange(4)
        if what == 0:
            data[at] = draw.randrange(256)
        elif what == 1:
            data[at : at + 4] = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
        elif what == 2:
            del data[at : at + draw.randrange(1, 200)]
        else:
            data[at:at] = data[: draw.randrange(200)]
        data = data or bytearray(b"\0")
    return bytes(data)


def _picture(draw: random.Random, place: Path) -> Path:
    suffix = draw.choice([*FORMATS])
    (place / "a").mkdir()
    path = place / "a" / f"x{draw.choice([*FORMATS, suffix, suffix])}"
    path.write_bytes(_bytes(draw, suffix))
    Image.new("RGB", (8, 6)).save(place / "a" / "whole.png")
    return path


def _archive(draw: random.Random, place: Path) -> Path:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as tar:
        for _ in range(draw.randrange(1, 6)):
            suffix = draw.choice([*FORMATS])
            levels = [draw.choice((*NAMES[:8], *NAMES, "..", ".", "/")) for _ in range(draw.choice((0, 1, 1, 1, 2, 3)))]
            member = tarfile.TarInfo("/".join([*levels, f"{draw.randrange(20)}{suffix}"]))
            data = _bytes(draw, suffix, (8, 6))
            member.size, member.type = (
                len(data),
                draw.choice((*[tarfile.REGTYPE] * 5, tarfile.SYMTYPE, tarfile.FIFOTYPE)),
            )
            tar.addfile(member, io.BytesIO(data))
            if draw.random() < 0.1:
                member.size = draw.choice((10**12, 2**33, -1024))
                made.write(member.tobuf(tarfile.GNU_FORMAT))
    data = bytearray(made.getvalue())
    for _ in range(draw.choice((0, 0, 2, 20))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path = place / "x.tar"
    path.write_bytes(data[: draw.choice((len(data), len(data), draw.randrange(len(data))))])
    return path


def _tree(draw: random.Random, place: Path) -> Path:
    folders = [place / "set"]
    folders[0].mkdir()
    for _ in range(draw.randrange(1, 14)):
        inside = draw.choice(folders)
        path = inside / draw.choice(NAMES)
        what = draw.randrange(8)
        if path.exists() or path.is_symlink():
            continue
        if what < 3:
            path.mkdir()
            folders.append(path)
        elif what == 3:
            path.symlink_to(draw.choice((*folders, path, place, Path("nowhere"))))
        elif what == 4:
            os.mkfifo(path.with_name(f"{draw.random()}.jpg"))
        elif what == 5:
            (inside / f"l{len(folders)}_{draw.random()}.png").symlink_to(
                draw.choice((path, place / "set", Path("/dev/zero")))
            )
        else:
            suffix = draw.choice([*FORMATS])
            (inside / f"{draw.randrange(99)}{suffix}").write_bytes(_bytes(draw, suffix, (8, 6)))
    return folders[0]
