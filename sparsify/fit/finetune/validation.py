"""Which weights are better, on images that nothing learns from: as sparse as they will be served, beside the teacher."""

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
class Score:
    """How a model did.

    Attributes:
        kl: KL(dense || sparse), nats, mean over images; of models without a head the relative squared error of features.
        agreement: percent of images with the dense model's answer; None without a head.
        top1: percent right; None without labels.
        images: judged.
    """

    kl: float
    agreement: float | None
    top1: float | None
    images: int

    def better_than(self, other: Score) -> bool:
        """Higher top-1 where there are labels, then lower KL; a score that is not a number is never better."""
        if self.kl != self.kl:
            return False
        if self.top1 is not None and other.top1 is not None and self.top1 != other.top1:
            return self.top1 > other.top1
        return self.kl < other.kl or other.kl != other.kl

    def words(self) -> str:
        """For a line at the terminal."""
        parts = [] if self.top1 is None else [f"top-1 {self.top1:.2f} %"]
        parts += [f"feature error {self.kl:.4f}"] if self.agreement is None else [
            f"agreement {self.agreement:.2f} %", f"KL {self.kl:.4f}",
        ]  # fmt: skip
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """Scores models on the same images; every process takes the batches that are its own.

    Args:
        images: this process's share.
        teacher: dense model on `device`; its answers are computed once and kept (images x classes numbers).
    """

    def __init__(self, images: Labelled, teacher: nn.Module, device: str) -> None:
        self.images, self.teacher, self.device = images, teacher, device
        self.answers: list[Tensor] = []

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> Score:
        """The score of a sparse model, computed in its sparse form; it is left in the mode that it was in."""
        training, first = model.training, not self.answers
        part = Part()
        model.eval()
        with execution.sparse_form(model):
            for i, (x, y) in enumerate(self.images()):
                x = x.to(self.device)
                if first:
                    self.answers.append(self.teacher(x).float().cpu())
                own = model(x).float().cpu()
                if getattr(model, "num_classes", 0):
                    part.logits.add(self.answers[i], own, y)
                part.error += len(x) * float(losses.pooled(self.answers[i], own))
                part.images += len(x)
                part.labelled += int((y >= 0).sum())
        model.train(training)
        return _score(processes.gather(part))


@dataclass
class Part:
    """What one process found: sums over its images."""

    logits: Logits = field(default_factory=Logits)
    error: float = 0.0  # squared error of the output as a share of the teacher's squares
    images: int = 0
    labelled: int = 0


def _score(parts: list[Part]) -> Score:
    whole = parts[0].logits
    for part in parts[1:]:
        whole.merge(part.logits)
    images = sum(part.images for part in parts)
    if not whole.compared:
        return Score(sum(part.error for part in parts) / max(1, images), None, None, images)
    found = whole.result(images)
    assert found.kl is not None
    return Score(found.kl, found.agreement, found.top1 if any(part.labelled for part in parts) else None, images)
