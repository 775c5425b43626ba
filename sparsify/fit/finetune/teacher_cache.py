"""What the teacher says of each image, kept on disk: for stages that see every image in one form only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from sparsify import processes
from sparsify.files import whole
from sparsify.fit.finetune.objective import Said, Teacher


class Cached:
    """A teacher that answers from disk where it can; `logits` and `tokens` losses only (`Stage` sees to that).

    Files FOLDER/RANK-*.npy, float32, one row an image: classes and n0 C numbers (150 kB an image for DeiT-Tiny). A row is
    marked as there after it was written, so that a killed run leaves nothing half-written behind.

    Args:
        teacher: who is asked for what is not there.
        images: number of images to learn from.
        folder: of this stage.
    """

    def __init__(self, teacher: Teacher, images: int, folder: Path) -> None:
        self.teacher, self.images, self.folder = teacher, images, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.there = self._file("there", lambda: np.zeros(images, bool))
        self.rows: dict[str, np.memmap] = {}

    def __call__(self, x: Tensor, index: Tensor) -> Said:
        """x [B, C, H, W], the images `index` [B] -> logits and patch tokens, float32 on the device of x."""
        at = index.numpy()
        if not self.there[at].all():
            said = self.teacher(x)
            for name, value in (("logits", said.logits), ("patch", said.patch)):
                if value is not None:
                    self._of(name, value)[at] = value.float().cpu().numpy()
            self.there[at] = True
        found = {name: torch.from_numpy(np.array(self._of(name, None)[at])).to(x.device) for name in self._names()}
        return Said(found.get("logits"), found.get("patch"))

    def _names(self) -> list[str]:
        wanted = self.teacher.wanted
        asked = (("logits", wanted.logits), ("patch", wanted.tokens))
        return [name for name, weight in asked if weight]

    def _of(self, name: str, like: Tensor | None) -> np.memmap:
        if name not in self.rows:
            shape = () if like is None else tuple(like.shape[1:])
            self.rows[name] = self._file(name, lambda: np.zeros((self.images, *shape), np.float32))
        return self.rows[name]

    def _file(self, name: str, empty: Callable[[], np.ndarray]) -> np.memmap:
        path = self.folder / f"{processes.rank()}-{name}.npy"
        if not path.exists():
            first = empty()
            with whole(path) as temporary:
                open_memmap(temporary, "w+", first.dtype, first.shape).flush()
        return open_memmap(path, "r+")
