"""Programs whose linear layers compute in int8: weights rounded by output channel when the program is written, inputs by the
runtime in each call. So nothing is fitted to images.

Only products with weights are rounded. Scores, weights of attention and whatever chooses keys and tokens stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyError, field
from sparsify.jobs.export.answers import of_any_number
from sparsify.measure.accuracy import Logits
from sparsify.nn import execution

PICTURES = 64  # built-in ones, to judge on
AT_ONCE = 16  # images
LEAST = 0.5  # of the answers, or of the cosine of features: a program below is wrong


class Rounded(NamedTuple):
    """What int8 did to the answers."""

    pictures: int  # number of them
    agreement: float | None  # percent of pictures with the float32 model's top-1 class; None: no classes
    kl: float | None  # KL(float32 || int8) of class probabilities, nats, mean per picture
    cosine: float | None  # of outputs that are no classes, mean over pictures

    def words(self) -> str:
        """One line for people."""
        if self.agreement is None:
            near = f"outputs near the float32 model's on {self.pictures} pictures, cosine {self.cosine:.4f}"
        else:
            near = (
                f"answers as the float32 model on {self.agreement:.1f} % of {self.pictures} pictures (KL {self.kl:.4f})"
            )
        return f"int8 linear layers: {near}"


def judge(model: nn.Module, run: Callable[[Tensor], Tensor], pictures: Tensor, batch_size: int | None) -> Rounded:
    """Compares the outputs of an int8 program for pictures [n, C, H, W] with those of the model that it was made from.

    Raises `SparsifyError` where fewer than `LEAST` of the answers are the model's.
    """
    total, answer, most = Logits(), of_any_number(run, batch_size), len(pictures)
    cosines: list[float] = []
    with torch.inference_mode(), execution.sparse_form(model):
        for batch in pictures.split(AT_ONCE):
            expected, found = model(batch), answer(batch)
            total.add(expected, found, torch.full((len(batch),), -1))
            cosines += torch.cosine_similarity(expected.flatten(1), found.flatten(1)).tolist()
    figures, cosine = total.result(most), sum(cosines) / most
    classes = getattr(model, "num_classes", 0) > 1
    agreement, kl = (figures.agreement, figures.kl) if classes else (None, None)
    right = cosine if agreement is None else agreement / 100
    if not right >= LEAST:
        raise SparsifyError(
            f"{field('int8')}: the program's answers are the model's for {right:.0%} only; nothing written"
        )
    return Rounded(most, agreement, kl, None if classes else cosine)
