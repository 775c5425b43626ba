"""Claims about the images that least squares are fitted to: themselves first, then crops of them."""

import random

import numpy as np
import torch
from PIL import Image

from sparsify.images.datasets import transform
from sparsify.images.loaders import Mapped
from sparsify.images.trainset import WithCrops

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def pictures(n):
    return [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8)) for i in range(n)]


def test_crops_make_up_the_number_where_there_are_fewer_images():
    found = [WithCrops(Mapped(pictures(2)), 5, CONFIG, seed)[i][0] for seed in (0, 1) for i in range(5)]
    first, second = found[:5], found[5:]
    whole = [transform(CONFIG)(picture) for picture in pictures(2)]
    for made in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(made, whole, strict=False))
        different = [made[0], made[2], made[4]]
        assert {x.shape for x in different} == {(3, 32, 32)}
        assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    assert not torch.equal(first[2], second[2])


def test_enough_images_are_not_cropped():
    data = WithCrops(Mapped(pictures(3)), 2, CONFIG, 0)
    assert len(data) == 2
    assert all(torch.equal(data[i][0], transform(CONFIG)(pictures(3)[i])) for i in range(2))


def test_a_crop_depends_on_nothing_else_and_leaves_other_random_numbers_alone():
    data = WithCrops(Mapped(pictures(2)), 6, CONFIG, 0)
    expected = [data[i][0] for i in range(6)]
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    again = [data[i][0] for i in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_an_image_that_cannot_be_read_is_named_each_time():
    broken = Mapped([*pictures(1), "no such file.jpg"])
    data = WithCrops(broken, 4, CONFIG, 0)
    assert [isinstance(data[i], str) for i in range(4)] == [False, True, False, True]
