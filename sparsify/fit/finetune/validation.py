"""Which weights are better, on images that nothing is trained on: a sparse model in its sparse form beside the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import processes
from sparsify.fit.finetune import losses
from sparsify.measure.accuracy import Logits
from sparsify.nn import execution

Labelled = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives the images anew at each call, always in the same batches: float32 [B, C, H, W] and labels int64 [B], -1 for none."""


@dataclass(frozen=True)
class ValidationScore:
    """Figures of a model on the validation images.

    Attributes:
        kl: KL(dense || sparse), nats, mean over images; of models without a head the relative squared error of features.
        agreement: percent of images with the dense model's top-1 class; None without a head.
        top1: percent; None without labels.
        images: how many were scored.
    """

    kl: float
    agreement: float | None
    top1: float | None
    images: int

    def better_than(self, other: ValidationScore) -> bool:
        """Higher top-1 where there are labels, then lower KL; a score that is not a number is never better."""
        if self.kl != self.kl:
            return False
        if self.top1 is not None and other.top1 is not None and self.top1 != other.top1:
            return self.top1 > other.top1
        return self.kl < other.kl or other.kl != other.kl

    def words(self) -> str:
        """The score as text for the terminal."""
        if self.agreement is None:
            parts = [f"feature error {self.kl:.4f}"]
        else:
            parts = [f"agreement {self.agreement:.2f} %", f"KL {self.kl:.4f}"]
        return ", ".join([*([] if self.top1 is None else [f"top-1 {self.top1:.2f} %"]), *parts])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Sums:
    """Sums over the images of one process."""

    logits: Logits = field(default_factory=Logits)
    error: float = 0.0  # relative squared error of the output
    images: int = 0
    labelled: bool = False


class Validator:
    """Scores models on the same images. Every process must call it; each computes its share of the images.

    Args:
        images: this process's share.
        teacher: dense model on `device`; its outputs are computed once and kept (images x classes numbers).
    """

    def __init__(self, images: Labelled, teacher: nn.Module, device: str) -> None:
        self.images, self.teacher, self.device = images, teacher, device
        self.teacher_outputs: list[Tensor] = []

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> ValidationScore:
        """The score of a sparse model in its sparse form. Its training mode is restored."""
        training, first = model.training, not self.teacher_outputs
        sums = _Sums()
        model.eval()
        with execution.sparse_form(model):
            for i, (x, y) in enumerate(self.images()):
                x = x.to(self.device)
                if first:
                    self.teacher_outputs.append(self.teacher(x).float().cpu())
                teacher, student = self.teacher_outputs[i], model(x).float().cpu()
                if getattr(model, "num_classes", 0):
                    sums.logits.add(teacher, student, y)
                sums.error += len(x) * float(losses.pooled(teacher, student))
                sums.images += len(x)
                sums.labelled |= bool((y >= 0).any())
        model.train(training)
        return _score(processes.gather(sums))


def _score(parts: list[_Sums]) -> ValidationScore:
    """The score over the images of all processes."""
    images, logits = sum(part.images for part in parts), parts[0].logits
    for part in parts[1:]:
        logits.merge(part.logits)
    if not logits.compared:
        return ValidationScore(sum(part.error for part in parts) / max(1, images), None, None, images)
    result = logits.result(images)
    assert result.kl is not None
    top1 = result.top1 if any(part.labelled for part in parts) else None
    return ValidationScore(result.kl, result.agreement, top1, images)
