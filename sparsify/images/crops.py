"""Images for least squares: each as the model sees it, then random crops of them until there are enough.

A few hundred images have features in common by chance, which a linear map would learn; with crops it learns fewer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from sparsify.images.datasets import train_transform, transform
from sparsify.images.loaders import Items, drawn, read
from sparsify.recipe import Augmentation

CROP = Augmentation(scale=(0.5, 1.0))  # at least half of the image, flipped or not


class WithCrops(Dataset):
    """`n` images as (tensor, label), or name and reason (text) of an image that cannot be read.

    The crop depends on the seed, the image and how often it came before.

    Args:
        items: the first n are used where there are more.
        config: the model's preprocessing (`datasets.data_config`).
    """

    def __init__(self, items: Items, n: int, config: dict[str, Any], seed: int) -> None:
        self.items, self.n, self.seed = items, n, seed
        self.whole, self.crop = transform(config), train_transform(CROP, config)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        turn, number = divmod(index, len(self.items))
        item = read(self.items, number)
        if isinstance(item, str):
            return item
        image, label = item
        if turn == 0:
            return self.whole(image), label
        with drawn(self.seed, "crop", turn, number):
            return self.crop(image), label
