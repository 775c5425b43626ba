"""The job behind `sparsify predict`: images -> the classes that a sparse model gives them, or their features.

The sparse form is always computed, as in `eval`. Batches come and go: memory does not grow with the number of images.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparsify.errors import UsageError, field
from sparsify.files.outputs import whole
from sparsify.files.tensor_rows import check_replaceable, tensor_rows
from sparsify.images import datasets, listed
from sparsify.images.class_words import class_words
from sparsify.images.listed import ImagePaths, Numbered
from sparsify.images.loaders import Decoded, Items, LooseBatches
from sparsify.nn import hosts
from sparsify.nn.adaptive import Adaptive, lead
from sparsify.nn.attention import Execution, check_sparse
from sparsify.nn.execution import check_execution, sparse_form
from sparsify.nn.token_models import TokenModel
from sparsify.processes import Compute, Listener

BATCH = 32
TOP = 5  # classes of an image, by default
TENSOR, KIND = "features", "sparsify.features"  # the tensor of a file of features, and the key of what they are
KINDS = ("patch", "pooled")
"""Features of every patch on the full grid, or of the whole image as the model pools them."""


class Prediction(NamedTuple):
    """What the model says of an image; nothing where its outputs are not finite.

    Of one output, a binary head's or a regression's, there are no classes: `probabilities` holds that output.
    """

    image: str
    classes: tuple[int, ...] = ()  # the most probable first
    names: tuple[str, ...] = ()  # of these classes; '' where the model does not know them
    probabilities: tuple[float, ...] = ()


class FeatureFile(NamedTuple):
    """A file of features that was written."""

    path: Path
    shape: tuple[int, ...]  # [images, patches, C] or [images, C]
    bytes: int


def predictions(
    model: nn.Module,
    images: ImagePaths,
    *,
    top: int = TOP,
    compute: Compute = Compute(),
    listener: Listener = Listener(),
) -> Iterator[Prediction]:
    """The `top` most probable classes of each image that can be read, in the listed order.

    Args:
        model: a sparse classifier, which may be adaptive; it is moved to the device and dtype of `compute`.
        compute: batch_size: 32 images if None.

    Raises:
        SparsifyError: not a sparse model.
        UsageError: a model without a classifier, or see `sparsify.measure.evaluate.evaluate_images`.
        BadData: no images, or none that can be read.
    """
    check_sparse(model)
    host = lead(model)
    classes = int(cast(Any, host).num_classes)
    if not classes:
        raise UsageError(f"the model has no classes: get its features with {field('features')}")
    words, note = class_words(host)
    if note:
        listener.say(note)
    _, batches = _answers(model, lambda x: cast(Tensor, model(x)), images, compute, listener)
    return chain.from_iterable(_told(names, logits.float(), words, min(top, classes)) for names, logits in batches)


def columns(classes: int, top: int = TOP) -> list[str]:
    """Heads of the columns of `write_csv` for a model of so many classes: of one output that, not probabilities."""
    ranks = range(1, min(top, classes) + 1)
    cells = ["output"] if classes == 1 else [f"{w}_{rank}" for rank in ranks for w in ("class", "name", "probability")]
    return ["image", *cells]


def write_csv(path: Path, found: Iterable[Prediction], heads: Sequence[str]) -> tuple[int, int]:
    """Writes predictions under `heads` (`columns`), a row for each image: its name, then what is known of each class.

    Returns how many rows there are, and how many of them are empty because the outputs are not finite.
    """
    rows = nonfinite = 0
    with (
        whole(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(heads)
        for each in found:
            numbers = [f"{p:.6g}" for p in each.probabilities]
            cells = (
                chain.from_iterable(zip(each.classes, each.names, numbers, strict=True)) if each.classes else numbers
            )
            writer.writerow([each.image, *cells])
            rows += 1
            nonfinite += not each.probabilities
    return rows, nonfinite


def write_features(
    model: nn.Module,
    images: ImagePaths,
    kind: str,
    path: Path,
    *,
    about: dict[str, str] | None = None,
    compute: Compute = Compute(),
    listener: Listener = Listener(),
) -> FeatureFile:
    """Writes the features of each image that can be read to a safetensors file, in the dtype of `compute`.

    The tensor `features` is [images, patches, C] of kind patch, row by row from the top left also where tokens were merged
    or dropped, and [images, C] of kind pooled. The metadata have `names`, a JSON list of the images in their order, and
    `grid`, rows and columns of patches.

    Args:
        model: sparse; it is moved to the device and dtype of `compute`.
        about: more metadata.

    Raises:
        BadFile: `path` cannot be written, or another file lies there.
        UsageError: an unknown kind, an adaptive model, or see `predictions`.
    """
    check_sparse(model)
    if isinstance(model, Adaptive):
        raise UsageError(f"features are of one schedule: give {field('budget')}, not {field('adaptive')}")
    if kind not in KINDS:
        raise UsageError(f"{field('features')} {kind}: expected one of {', '.join(KINDS)}")
    check_replaceable(path, KIND)
    compute_features = patch_features if kind == "patch" else pooled_features
    items, batches = _answers(model, lambda x: compute_features(model, x), images, compute, listener)
    rows, columns = hosts.patch_grid(model)
    metadata = {**(about or {}), KIND: kind, "grid": f"{rows}x{columns}"}
    with tensor_rows(path, TENSOR, metadata, [items.name(i) for i in range(len(items))]) as file:
        for names, features in batches:
            file.add(names, features)
    return FeatureFile(path, file.shape, path.stat().st_size)


def patch_features(model: nn.Module, x: Tensor) -> Tensor:
    """Images [B, C, H, W] -> features of every patch after the last norm, [B, patches, C], whatever became of its token."""
    full = {"full_grid": True} if isinstance(model, TokenModel) else {}
    return cast(Tensor, cast(Any, model).forward_features(x, **full))[:, hosts.num_prefix_tokens(model) :]


def pooled_features(model: nn.Module, x: Tensor) -> Tensor:
    """Images [B, C, H, W] -> features of the images as the model pools them, [B, C]."""
    host = cast(Any, model)
    return cast(Tensor, host.forward_head(host.forward_features(x), pre_logits=True))


def _answers(
    model: nn.Module, answer: Callable[[Tensor], Tensor], images: ImagePaths, compute: Compute, listener: Listener
) -> tuple[Items, Iterator[tuple[list[str], Tensor]]]:
    """The images, and what the sparse form answers to each batch of them: their names, and a tensor on the CPU."""
    host = lead(model)
    device, dtype = compute.torch_device, compute.torch_dtype
    check_execution(Execution(compute.backend, compute.kernel_precision), device, dtype, hosts.biased(host))
    items, note = listed.opened(images)
    if note:
        listener.say(note)
    dataset = Decoded(Numbered(items), datasets.transform(datasets.data_config(host)))
    name = images.paths[0] if len(images.paths) == 1 else "the images"
    loader = LooseBatches(dataset, compute.batch_size or BATCH, compute.workers, images.strict, name=name)

    def batches() -> Iterator[tuple[list[str], Tensor]]:
        model.to(device, dtype).eval()
        done = 0
        with sparse_form(model, compute.backend, compute.kernel_precision):
            for x, numbers in loader:
                with torch.inference_mode():
                    out = answer(x.to(device, dtype)).cpu()
                yield [items.name(i) for i in numbers.tolist()], out
                done += len(x)
                listener.progress("predict", done + loader.flaws.broken, len(items))
        for line in loader.flaws.lines():
            listener.say(line)

    return items, batches()


def _told(images: list[str], logits: Tensor, words: tuple[str, ...], top: int) -> Iterator[Prediction]:
    """Predictions of images from their logits [B, classes]."""
    single = logits.shape[1] == 1
    best = (logits if single else logits.softmax(-1)).topk(top)
    finite = logits.isfinite().all(1).tolist()
    rows = zip(images, best.indices.tolist(), best.values.tolist(), finite, strict=True)
    for image, classes, probabilities, known in rows:
        if not known:
            yield Prediction(image)
        elif single:
            yield Prediction(image, probabilities=tuple(probabilities))
        else:
            names = tuple(words[c] if words else "" for c in classes)
            yield Prediction(image, tuple(classes), names, tuple(probabilities))
