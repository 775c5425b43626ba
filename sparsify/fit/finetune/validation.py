"""Which weights are better, on images that nothing is trained on: a sparse model in its sparse form beside the teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import processes
from sparsify.fit.finetune import losses
from sparsify.measure.accuracy import Logits, classify
from sparsify.nn import execution

Labelled = Iterable[tuple[Tensor, Tensor]]
"""Images in the same batches in each iteration: float32 [B, C, H, W] and labels int64 [B], -1 for none."""


@dataclass(frozen=True)
class ValidationScore:
    """Figures of a model on the validation images."""

    # KL(dense || sparse), nats, mean over images; the relative squared error of features without a head, and of outputs
    # whose softmax says nothing (`accuracy.classify`)
    kl: float
    agreement: float | None  # percent of images with the dense model's top-1 class; None where `kl` is a squared error
    top1: float | None  # percent; None without labels
    images: int  # how many were scored

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> ValidationScore:
        """From its fields in JSON, which has no NaN."""
        return cls(
            **{"kl": math.nan, **{name: value for name, value in saved.items() if name != "kl" or value is not None}}
        )

    def better_than(self, other: ValidationScore) -> bool:
        """Higher top-1 where there are labels, then lower KL; a score that is not a number is never better."""
        if self.kl != self.kl:
            return False
        if self.top1 is not None and other.top1 is not None and self.top1 != other.top1:
            return self.top1 > other.top1
        return self.kl < other.kl or other.kl != other.kl

    def words(self) -> str:
        """The score as text for the terminal."""
        top1 = "" if self.top1 is None else f"top-1 {self.top1:.2f} %, "
        if self.agreement is None:
            return f"{top1}relative squared error {self.kl:.4f}"
        return f"{top1}agreement {self.agreement:.2f} %, KL {self.kl:.4f}"


class Validator:
    """Scores models on the same images. Every process must call it; each computes its part of the images.

    The outputs of `teacher`, dense on `device`, are computed once and kept (images x classes numbers).
    """

    def __init__(self, images: Labelled, teacher: nn.Module, device: str) -> None:
        self.images, self.teacher, self.device = images, teacher, device
        self.teacher_outputs: list[Tensor] = []
        # of the first call on, where softmax says nothing of the teacher's outputs: their mean square over all images
        self.scale: float | None = None

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> ValidationScore:
        """The score of a sparse model in its sparse form. Its training mode is restored."""
        training, first = model.training, not self.teacher_outputs
        logits, error, images = Logits(), 0.0, 0  # error: relative squared error of pooled features
        model.eval()
        with execution.sparse_form(model):
            for i, (x, y) in enumerate(self.images):
                x = x.to(self.device)
                if first:
                    self.teacher_outputs.append(self.teacher(x).float().cpu())
                teacher, student = self.teacher_outputs[i], model(x).float().cpu()
                if getattr(model, "num_classes", 0):
                    logits.add(teacher, student, y)
                else:
                    error += len(x) * float(losses.pooled(teacher, student))
                images += len(x)
        model.train(training)
        classified = first and any(map(classify, self.teacher_outputs))
        return self._score(processes.gather((logits, error, images, classified)), first)

    def _score(self, parts: list[tuple[Logits, float, int, bool]], first: bool) -> ValidationScore:
        """The score over the images of all processes, from the sums of each."""
        (logits, *others), errors, counts, classified = zip(*parts, strict=True)
        for other in others:
            logits.merge(other)
        images = sum(counts)
        if not logits.compared:
            return ValidationScore(sum(errors) / max(1, images), None, None, images)
        result, (error, size) = logits.result(images), logits.squares
        if first and not any(classified) and size:
            self.scale = size / images
        if result.nonfinite:
            return ValidationScore(math.nan, result.agreement, result.top1, images)
        if self.scale is not None:
            return ValidationScore(error / size, None, result.top1, images)
        return ValidationScore(math.nan if result.kl is None else result.kl, result.agreement, result.top1, images)
