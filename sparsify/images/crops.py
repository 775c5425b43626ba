"""Images that least squares are fitted to: each as the model sees it, then random crops of them until there are enough.

A few hundred images have things in common by chance, and a linear map learns them; of crops it learns fewer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from sparsify.images.datasets import train_transform, transform
from sparsify.images.loaders import Items, drawn, read
from sparsify.recipe import Augmentation

CROP = Augmentation(scale=(0.5, 1.0))  # at least half of the picture, flipped or not


class WithCrops(Dataset):
    """`n` images as (tensor, label), or the name and reason of one that cannot be read.

    What is cut out depends on the seed, the image and how often it has come before.

    Args:
        items: images by number; the first n where there are more.
        config: the model's preprocessing (`data.data_config`).
    """

    def __init__(self, items: Items, n: int, config: dict[str, Any], seed: int) -> None:
        self.items, self.n, self.seed = items, n, seed
        self.whole, self.crop = transform(config), train_transform(CROP, config)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        turn, place = divmod(index, len(self.items))
        found = read(self.items, place)
        if isinstance(found, str):
            return found
        if turn == 0:
            return self.whole(found[0]), found[1]
        with drawn(self.seed, "crop", turn, place):
            return self.crop(found[0]), found[1]
