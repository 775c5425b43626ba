"""Programs whose linear layers compute in int8: weights by output channel, inputs by tensor, fitted to images by NNCF.

Only products with weights are rounded. Scores, weights of attention and whatever chooses keys and tokens stay as they are.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsify.errors import BadData, SparsifyError, field, one_line
from sparsify.images import datasets
from sparsify.images.trainset import builtin_calibration, trainset
from sparsify.jobs.export.answers import of_any_number
from sparsify.measure.accuracy import Logits
from sparsify.models.digits import network
from sparsify.nn import execution

IMAGES = 128  # to calibrate on, and as many others to judge on
AT_ONCE = 16  # images
LEAST = 0.5  # of the answers, or of the cosine of features: a program below is wrong


class Rounded(NamedTuple):
    """What int8 did to the answers, on images that it was not calibrated on."""

    calibrated: int  # number of images
    judged: int  # number of images
    source: str  # where the images are from
    agreement: float | None  # percent of images with the float32 model's top-1 class; None: no classes
    kl: float | None  # KL(float32 || int8) of class probabilities, nats, mean per image
    cosine: float | None  # of outputs that are no classes, mean over images

    def words(self) -> str:
        """One line for people."""
        if self.agreement is None:
            near = f"outputs near the float32 model's, cosine {self.cosine:.4f}"
        else:
            near = f"answers as the float32 model on {self.agreement:.1f} % (KL {self.kl:.4f})"
        return f"int8 linear layers, calibrated on {self.calibrated} images of {self.source}: {near} of {self.judged} others"


class Pictures(NamedTuple):
    """Images to calibrate on and others to judge on, [n, C, H, W] each, as the model expects them."""

    calibrate: Tensor
    judge: Tensor
    source: str


def check_packages() -> None:
    """Raise `SparsifyError` if NNCF is missing."""
    try:
        importlib.import_module("nncf")
    except ImportError:
        raise SparsifyError(f"{field('int8')} needs nncf: pip install 'sparsify-vit[int8]'") from None


def pictures(model: nn.Module, architecture: str, data: str | None) -> Pictures:
    """Images of a folder or data set, or the built-in ones, in two halves without a common image.

    Raises `BadData` where there are fewer than two.
    """
    transform = datasets.transform(datasets.data_config(model))
    if data is None:
        found = builtin_calibration(architecture == network.ARCHITECTURE, 2 * IMAGES, 0, transform)
    else:
        found = trainset(data).calibration(2 * IMAGES, 0, transform)
    images = torch.cat(list(found))
    if len(images) < 2:
        raise BadData(f"{field('int8')}: {found.name} holds 1 image; 2 or more are expected, half of them to judge by")
    half = len(images) // 2
    return Pictures(images[:half], images[half:], found.name)


def judge(model: nn.Module, run: Callable[[Tensor], Tensor], images: Pictures, batch_size: int | None) -> Rounded:
    """Compares the outputs of an int8 program with those of the model that it was made from.

    Raises `SparsifyError` where fewer than `LEAST` of the answers are the model's.
    """
    total, answer, most = Logits(), of_any_number(run, batch_size), len(images.judge)
    cosines: list[float] = []
    with torch.inference_mode(), execution.sparse_form(model):
        for batch in images.judge.split(AT_ONCE):
            expected, found = model(batch), answer(batch)
            total.add(expected, found, torch.full((len(batch),), -1))
            cosines += torch.cosine_similarity(expected.flatten(1), found.flatten(1)).tolist()
    figures, cosine = total.result(most), sum(cosines) / most
    classes = getattr(model, "num_classes", 0) > 1
    agreement, kl = (figures.agreement, figures.kl) if classes else (None, None)
    right = cosine if agreement is None else agreement / 100
    if not right >= LEAST:
        raise SparsifyError(
            f"{field('int8')}: the program's answers are the model's for {right:.0%} only; nothing written. "
            f"Calibrate on images as the model will see ({field('data')})"
        )
    return Rounded(len(images.calibrate), most, images.source, agreement, kl, None if classes else cosine)


def linear_layers(model: Any, others: Sequence[str], calls: Sequence[Any]) -> Any:
    """An OpenVINO or ONNX model with int8 linear layers.

    Args:
        others: names of the operators to leave as they are.
        calls: inputs, as the runtime takes them.

    Raises `SparsifyError` where NNCF cannot do it.
    """
    nncf: Any = importlib.import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    try:
        return nncf.quantize(
            model,
            nncf.Dataset(calls),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calls),
            ignored_scope=nncf.IgnoredScope(names=[*others], validate=False),
        )
    except Exception as error:
        raise SparsifyError(f"{field('int8')}: nncf cannot quantise this program: {one_line(error)}") from error
