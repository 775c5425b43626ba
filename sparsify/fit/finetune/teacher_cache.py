"""The teacher's outputs for each image, kept on disk: for stages that see every image in one form only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from sparsify import processes
from sparsify.files import whole
from sparsify.fit.finetune.objective import Outputs, Teacher


class CachedTeacher:
    """Reads the teacher's outputs from disk where it can; for losses `logits` and `tokens` only (`Stage` sees to that).

    Files FOLDER/RANK-*.npy, float32, one row an image: classes and n0 C numbers (150 kB an image for DeiT-Tiny). A row is
    marked as present after it was written, so that a killed run leaves nothing half-written behind.

    Args:
        teacher: computes what is missing.
        images: number of training images.
        folder: of this stage.
    """

    def __init__(self, teacher: Teacher, images: int, folder: Path) -> None:
        self.teacher, self.images, self.folder = teacher, images, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.present = self._file("there", (), bool)
        self.rows: dict[str, np.memmap] = {}
        weights = {"logits": teacher.losses.logits, "patch": teacher.losses.tokens}
        self.names = [name for name, weight in weights.items() if weight]

    def __call__(self, x: Tensor, index: Tensor) -> Outputs:
        """x [B, C, H, W], the images `index` [B] -> logits and patch tokens, float32 on the device of x."""
        rows = index.numpy()
        if not self.present[rows].all():
            outputs = self.teacher(x)
            for name in ("logits", "patch"):
                value = getattr(outputs, name)
                if value is not None:
                    self._rows(name, tuple(value.shape[1:]))[rows] = value.float().cpu().numpy()
            self.present[rows] = True
        read = {name: torch.from_numpy(np.array(self._rows(name)[rows])).to(x.device) for name in self.names}
        return Outputs(read.get("logits"), read.get("patch"))

    def _rows(self, name: str, shape: tuple[int, ...] = ()) -> np.memmap:
        if name not in self.rows:
            self.rows[name] = self._file(name, shape, np.float32)
        return self.rows[name]

    def _file(self, name: str, shape: tuple[int, ...], dtype: type) -> np.memmap:
        """The file of one output, made with zeros where it is missing; a row has that shape."""
        path = self.folder / f"{processes.rank()}-{name}.npy"
        if not path.exists():
            with whole(path) as temporary:
                open_memmap(temporary, "w+", dtype, (self.images, *shape)).flush()
        return open_memmap(path, "r+")
