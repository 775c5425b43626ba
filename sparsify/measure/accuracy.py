"""How a sparse model's outputs differ from the dense one's: figures of two tensors, and sums over a pass.

Three errors of features have names of their own: the *relative error* of an image, |sparse - dense| / |dense|
(`relative_error`); the *relative squared error* of a batch, all squares together (`distance`); and its mean over images,
which fine-tuning lowers (`sparsify.fit.finetune.losses.pooled`).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.measure import neighbours

FLAT = 1e-4  # nats: class probabilities nearer to uniform than this are told from noise no more

FEATURES = ("cosine_pooled", "rel_error_pooled", "cosine_patch", "rel_error_patch")
Output = tuple[Tensor, Tensor]  # of a model without a head: pooled features [B, C], tokens [B, N, C]


@dataclass(frozen=True)
class Evaluation:
    """Results; None where a figure does not apply (`docs/glossary.md` has the words), or where there is no dense model."""

    model: str = ""  # this and the next four: what was evaluated, in timm's words
    param_count: int | None = None
    img_size: int | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    images: int = 0  # images counted
    drawn_from: int | None = None  # images there, where only some of them were drawn
    broken: int = 0  # images that could not be read
    nonfinite: int = 0  # images with a NaN or infinity in an output: wrong, without agreement, and in no mean
    top1: float | None = None  # percent, as all accuracies
    top5: float | None = None
    dense_top1: float | None = None
    dense_top5: float | None = None
    agreement: float | None = None  # percent of images with the same top-1 class as dense
    images_lost: int | None = None  # dense right and sparse wrong
    images_gained: int | None = None  # the reverse
    kl: float | None = None  # KL(dense || sparse) of class probabilities, nats, mean per image; None also if not finite
    kl_error: float | None = None  # standard error of `kl`: deviation over the images / sqrt(images)
    correlation: float | None = None  # of one output with the dense one, over the images (Pearson)
    rel_error_output: float | None = None  # |sparse - dense| / |dense| of one output, over all images together
    # of features, mean over images, with the standard error of the mean
    cosine_pooled: float | None = None  # cosine similarity
    cosine_pooled_error: float | None = None
    cosine_patch: float | None = None
    cosine_patch_error: float | None = None
    rel_error_pooled: float | None = None  # relative error (`relative_error`)
    rel_error_pooled_error: float | None = None
    rel_error_patch: float | None = None
    rel_error_patch_error: float | None = None
    # nearest neighbours by the pooled features, of each image among the others (`sparsify.measure.neighbours`)
    neighbours: int | None = None  # how many `neighbour_overlap` compares
    neighbour_overlap: float | None = None  # percent of an image's nearest neighbours that are the dense model's too
    neighbour_overlap_error: float | None = None
    knn_top1: float | None = None  # accuracy of a vote of the nearest
    dense_knn_top1: float | None = None
    recall_at_1: float | None = None  # percent of images with one of their class among the nearest one
    recall_at_1_error: float | None = None
    dense_recall_at_1: float | None = None
    recall_at_5: float | None = None
    recall_at_5_error: float | None = None
    dense_recall_at_5: float | None = None
    recall_at_10: float | None = None
    recall_at_10_error: float | None = None
    dense_recall_at_10: float | None = None
    ran_twice: float | None = None  # percent of images, of adaptive inference
    throughput_sparse: float | None = None  # images/s, measured in this pass; of several processes the sum
    throughput_dense: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Logits:
    """Sums over logits [B, classes]; without dense ones only the sparse model's own figures, without labels no accuracy.

    Of one output, a binary head's or a regression's, there are no classes: only how near it is to the dense one.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # images, by the figure of `Evaluation`
        self.compared = 0
        self.kl = self.kl_squares = 0.0  # sums over images
        self.single = False
        self.moments = torch.zeros(5, dtype=torch.float64)  # of outputs d and s: sums of d, s, d^2, s^2 and d s

    def add(self, dense: Tensor | None, sparse: Tensor, y: Tensor) -> None:
        sparse, dense = sparse.float().cpu(), None if dense is None else dense.float().cpu()
        finite = _finite(sparse, dense)
        self.counts["nonfinite"] += int((~finite).sum())
        self.compared += 0 if dense is None else len(y)
        self.single = sparse.shape[1] == 1
        if dense is not None:
            d, s = dense[finite].double(), sparse[finite].double()
            self.moments += torch.stack([x.sum() for x in (d, s, d * d, s * s, d * s)])
        if self.single:
            return
        images = {}
        if labelled(y):
            images["top1"], images["top5"] = s, _ = _right(sparse, y)
            if dense is not None:
                images["dense_top1"], images["dense_top5"] = d, _ = _right(dense, y)
                images |= {"images_lost": d & ~s, "images_gained": s & ~d}
        if dense is not None:
            images["agreement"] = (dense.argmax(1) == sparse.argmax(1)) & finite
            each = kl_terms(dense, sparse).double().sum(-1)  # (B)
            self.kl += float(each.sum())
            self.kl_squares += float(each.square().sum())
        self.counts.update({name: int(which.sum()) for name, which in images.items()})

    def merge(self, other: Logits) -> None:
        """Adds the sums over other images."""
        self.counts.update(other.counts)
        self.compared += other.compared
        self.kl += other.kl
        self.kl_squares += other.kl_squares
        self.single |= other.single
        self.moments = self.moments + other.moments

    @property
    def squares(self) -> tuple[float, float]:
        """Sums over all images and outputs of the squared differences, and of the dense outputs' squares."""
        _, _, dd, ss, ds = self.moments.tolist()
        return max(0.0, dd + ss - 2 * ds), dd

    def result(self, n: int) -> Evaluation:
        counts = {"nonfinite", "images_lost", "images_gained"}
        figures: dict[str, Any] = {name: k if name in counts else 100 * k / n for name, k in self.counts.items()}
        if self.single and self.compared:
            error, size = self.squares
            figures["rel_error_output"] = _known(math.sqrt(error / size) if size else math.nan)
            figures["correlation"] = self._correlation(n - self.counts["nonfinite"])
        if not self.compared or self.single:
            return Evaluation(**figures)
        return Evaluation(**figures, kl=_known(self.kl / n), kl_error=standard_error(self.kl, self.kl_squares, n))

    def _correlation(self, n: int) -> float | None:
        d, s, dd, ss, ds = self.moments.tolist()
        spread = math.sqrt(max(0.0, (dd - d * d / max(n, 1)) * (ss - s * s / max(n, 1))))
        return (ds - d * s / n) / spread if spread else None


class Features:
    """Pooled features and tokens of models without a classifier; `prefix` tokens are no patches."""

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix
        self.sums = torch.zeros(2, 4, dtype=torch.float64)  # of `FEATURES` over images, and of their squares
        self.pooled: dict[str, list[Tensor]] = {"dense": [], "sparse": []}
        self.labels: list[Tensor] = []
        self.nonfinite = 0

    def add(self, dense: Output | None, sparse: Output, y: Tensor) -> None:
        self.pooled["sparse"].append(sparse[0].float().cpu())
        self.labels.append(y)
        self.nonfinite += int((~(_finite(*sparse) & (True if dense is None else _finite(*dense)))).sum())
        if dense is None:
            return
        pairs = [(dense[0][:, None], sparse[0][:, None]), (dense[1][:, self.prefix :], sparse[1][:, self.prefix :])]
        each = []
        for d, s in pairs:
            d, s = d.float().cpu(), s.float().cpu()  # (B, 1, C), (B, n, C)
            each += [torch.cosine_similarity(d, s, dim=-1).mean(1), relative_error(d, s)]
        values = torch.stack(each).double()  # (4, B)
        self.sums += torch.stack([values.sum(1), values.square().sum(1)])
        self.pooled["dense"].append(dense[0].float().cpu())

    def merge(self, other: Features) -> None:
        """Adds the sums and features of other images."""
        self.sums = self.sums + other.sums
        self.labels += other.labels
        self.nonfinite += other.nonfinite
        for name, features in other.pooled.items():
            self.pooled[name] += features

    def result(self, n: int, progress: neighbours.Progress = neighbours.nothing) -> Evaluation:
        figures: dict[str, Any] = {"nonfinite": self.nonfinite}
        if self.pooled["dense"]:
            for name, total, squares in zip(FEATURES, *self.sums.tolist(), strict=True):
                figures[name], figures[f"{name}_error"] = _known(total / n), standard_error(total, squares, n)
        pooled = {name: torch.cat(features) for name, features in self.pooled.items() if features}
        return Evaluation(**figures, **neighbours.figures(pooled, torch.cat(self.labels), progress))


def standard_error(total: float, squares: float, n: int) -> float | None:
    """Of the mean of n values, from their sum and the sum of their squares; None for one value, or if not finite."""
    around = squares - total**2 / n  # squares of the differences from the mean
    return math.sqrt(max(0.0, around) / (n - 1) / n) if n > 1 and math.isfinite(around) else None


def kl_terms(dense: Tensor, sparse: Tensor) -> Tensor:
    """p (log p - log q) of the class probabilities of logits [B, classes], nats: an image's sum is KL(dense || sparse)."""
    p, q = dense.float().log_softmax(-1), sparse.float().log_softmax(-1)
    return p.exp() * (p - q)


def classify(logits: Tensor) -> bool:
    """Whether class probabilities say something of a dense model's logits [B, classes].

    They do not for one output, a binary head's or a regression's, whose softmax is 1, nor where all classes are as likely
    as each other (less than `FLAT` nats from uniform, mean over images).
    """
    p = logits.float().log_softmax(-1)
    return bool((p.exp() * (p + math.log(p.shape[-1]))).sum(-1).mean() >= FLAT)


def relative_error(dense: Tensor, sparse: Tensor) -> Tensor:
    """|sparse - dense| / |dense| of each image's features [B, n, C], by the Euclidean norm: [B]."""
    return (dense - sparse).norm(dim=(1, 2)) / dense.norm(dim=(1, 2)).clamp_min(1e-12)


def distance(dense: Tensor, sparse: Tensor, logits: bool) -> float:
    """How far apart outputs of a batch are: mean KL(dense || sparse) of logits, relative squared error of features.

    Logits of which a softmax says nothing (`classify`) count as features.
    """
    if logits and classify(dense):
        return float(kl_terms(dense, sparse).sum(-1).mean())
    return float((dense - sparse).square().sum() / dense.square().sum())


def labelled(y: Tensor) -> bool:
    """Whether any of the images with labels y [B], -1 for none, has one."""
    return bool((y >= 0).any())


def _right(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the label is the first, and among the first five: bool [B] each."""
    right = (logits.topk(min(5, logits.shape[1])).indices == y[:, None]).cumsum(1).bool()  # (B, k)
    right &= _finite(logits)[:, None]
    return right[:, 0], right[:, -1]


def _finite(*outputs: Tensor | None) -> Tensor:
    """Which images have finite outputs [B, ...] only, bool [B]."""
    return torch.stack([x.flatten(1).isfinite().all(1).cpu() for x in outputs if x is not None]).all(0)


def _known(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None
