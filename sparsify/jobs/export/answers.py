"""Whether a program answers as the model does that it was made from."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyError
from sparsify.images import datasets
from sparsify.images.trainset import builtin_calibration
from sparsify.models.digits import network
from sparsify.nn import execution

PICTURES = 8  # on which program and model are compared
TOLERANCE = 1e-3  # difference of an output that is reported
WRONG = 1e-2  # difference, as a fraction of the model's largest output, that no rounding explains


class Checked(NamedTuple):
    """How a program's outputs compare with the model's."""

    median: float  # of each picture's largest difference
    most: float  # of the same
    apart: int  # number of pictures that differ by more than `TOLERANCE`
    pictures: int  # number of pictures compared
    largest: float  # the model's largest output

    def words(self) -> str:
        """One line for people."""
        checked = f"checked against the model on {self.pictures} pictures: answers up to {self.largest:.3g} differ"
        ties = f"; by more than {TOLERANCE:g} on {self.apart}: near ties (docs/export.md)" if self.apart else ""
        return f"{checked} by at most {self.most:.1e}, in the median by {self.median:.1e}{ties}"


def pictures_for(model: nn.Module, architecture: str, n: int = PICTURES) -> Tensor:
    """Pictures [n, C, H, W] to compare program and model on, preprocessed; noise where C is unusual."""
    config, is_digits = datasets.data_config(model), architecture == network.ARCHITECTURE
    if config["input_size"][0] != 3 and not is_digits:
        return torch.randn(n, *config["input_size"], generator=torch.Generator().manual_seed(0))
    return torch.cat([*builtin_calibration(is_digits, n, 0, datasets.transform(config))])


def compare(model: nn.Module, run: Callable[[Tensor], Tensor], pictures: Tensor, batch_size: int | None) -> Checked:
    """Compares the outputs of program and model for `pictures`.

    Some pictures may differ a little: where two keys, cells or tokens score the same to rounding, another order of
    summation selects the other one, as it does between two backends of the model itself.

    Raises:
        SparsifyError: half of the pictures or more differ by more than that can explain.
    """
    count, answer = len(pictures), of_any_number(run, batch_size)
    differences, largest = [], 0.0
    with torch.inference_mode(), execution.sparse_form(model):
        for batch in (pictures,) if batch_size else (pictures[:1], pictures[1:]):
            expected, outputs = model(batch), answer(batch)
            if outputs.shape != expected.shape:
                shapes = f"{tuple(outputs.shape)} instead of {tuple(expected.shape)}"
                raise SparsifyError(f"the program answers {shapes}; nothing written")
            differences += (outputs - expected).abs().flatten(1).amax(1).tolist()
            largest = max(largest, expected.abs().max().item())
    limit = max(TOLERANCE, WRONG * largest)
    wrong = sum(not difference <= limit for difference in differences)
    if 2 * wrong >= count:
        raise SparsifyError(
            f"the program's answers differ from the model's, which go up to {largest:.3g}, by more than {limit:.2g} "
            f"on {wrong} of {count} pictures; nothing written"
        )
    apart = sum(difference > TOLERANCE for difference in differences)
    return Checked(statistics.median(differences), max(differences), apart, count, largest)


def of_any_number(run: Callable[[Tensor], Tensor], batch_size: int | None) -> Callable[[Tensor], Tensor]:
    """The program for any number of images: in batches of its size, the last one filled up; `batch_size` None: at once."""

    def outputs(images: Tensor) -> Tensor:
        if batch_size is None:
            return run(images)
        filled = torch.cat([images, images[:1].expand(-len(images) % batch_size, -1, -1, -1)])
        return torch.cat([run(part) for part in filled.split(batch_size)])[: len(images)]

    return outputs
