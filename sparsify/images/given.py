"""Images that the caller holds, tensors or a loader of them, as calibration reads them: already normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadData, field, short
from sparsify.images.datasets import data_config
from sparsify.nn import hosts

FORMS = "batches of tensors [B, 3, H, W], or (images, labels), or a dict with one such tensor"


@dataclass(frozen=True)
class GivenImages:
    """Tensors, or what gives them: a DataLoader or any other iterable, which is read once and no further than needed."""

    source: Tensor | Iterable[Any]
    option: str = "data"  # the argument that they were given by

    def first(self, n: int, model: nn.Module, progress: Callable[..., None] = lambda *step: None) -> Tensor:
        """The first `n` images, or as many as there are: [n, 3, H, W], float32, on the CPU.

        progress: called with the step, the images read, and `n`.

        Raises:
            BadData: none, or something else than floating-point images of the model's size.
        """
        found: list[Tensor] = []
        count = 0
        for item in self._items():
            images = _images(item, hosts.image_size(model), self.option)
            found.append(images[: n - count].detach().to("cpu", torch.float32))
            count += len(found[-1])
            progress("reading", count, n)
            if count >= n:
                break
        if not count:
            raise BadData(f"{field(self.option)} holds no images: {FORMS} are expected")
        return torch.cat(found)

    def _items(self) -> Iterator[Any]:
        if isinstance(self.source, Tensor):
            return iter((self.source,))
        try:
            return iter(self.source)
        except TypeError:
            kind = f"{field(self.option)} is of class {type(self.source).__name__}"
            raise BadData(
                f"{kind}: a folder, a data set, tensors [B, 3, H, W] or an iterable of them is expected"
            ) from None


def _images(item: Any, size: tuple[int, int], option: str) -> Tensor:
    """The images [B, 3, H, W] of one item."""
    found, gives = item, f"{field(option)} gives"
    if isinstance(item, Mapping):
        tensors = [key for key, value in item.items() if isinstance(value, Tensor) and value.ndim in (3, 4)]
        if len(tensors) != 1:
            keys = short(", ".join(map(str, item)), 200)
            raise BadData(f"{gives} dicts with {keys}: one tensor of images [B, 3, H, W] is expected")
        found = item[tensors[0]]
    elif isinstance(item, list | tuple) and item:
        found = item[0]
    if not isinstance(found, Tensor):
        raise BadData(f"{gives} {type(found).__name__}, not tensors: {FORMS} are expected")
    found = found[None] if found.ndim == 3 else found
    if found.ndim != 4 or found.shape[1:] != (3, *size):
        shape, expected = "x".join(map(str, found.shape)), f"[B, 3, {size[0]}, {size[1]}]"
        raise BadData(f"{gives} tensors of {shape}: this model takes {expected}")
    if not found.is_floating_point():
        kind = str(found.dtype).removeprefix("torch.")
        raise BadData(f"{gives} {kind}: floating-point images are expected, normalised as the model's")
    return found


def note(images: Tensor, model: nn.Module, option: str) -> str:
    """One line where the values cannot be those of pixels that the model's mean and std normalised; else ''."""
    config = data_config(model)
    mean, std = (torch.as_tensor(config[name], dtype=torch.float32) for name in ("mean", "std"))
    low, high = float((-mean / std).min()), float(((1 - mean) / std).max())
    least, most = float(images.min()), float(images.max())
    if most <= 2 * high and least >= 2 * min(low, -0.5) and (least < 0 or low >= 0):
        return ""
    values = f"values from {least:.3g} to {most:.3g}, where normalised ones lie from {low:.3g} to {high:.3g}"
    how = ", ".join(f"{name} {tuple(round(v, 4) for v in config[name])}" for name in ("mean", "std"))
    return f"warning: {field(option)} has {values}: are they normalised by this model's {how}?"
