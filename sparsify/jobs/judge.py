"""The job behind `sparsify eval PROGRAM`: an exported program in its runtime, beside the file that it was made from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparsify.errors import BadFile, SparsifyError, UsageError, field, one_line
from sparsify.images.measured import EvaluationImages
from sparsify.jobs.export import answers
from sparsify.jobs.export import program as exporting
from sparsify.measure.accuracy import Evaluation
from sparsify.measure.evaluate import Described, over
from sparsify.measure.passes import DENSE, SPARSE
from sparsify.models import checkpoint, header
from sparsify.nn.execution import sparse_form
from sparsify.processes import Compute, Listener

SUFFIXES = {writer.SUFFIX: format for format, writer in exporting.FORMATS.items()}


class Judged(NamedTuple):
    """Results of a program; figures of `dense` are those of the file's model, None without a file."""

    evaluation: Evaluation
    file: Path | None  # the one that it was made from
    format: str
    attention: str
    precision: str  # of the linear layers: float32 or int8


class _Runs(nn.Module):
    """A program as a model."""

    def __init__(self, run: Callable[[Tensor], Tensor], classes: int) -> None:
        super().__init__()
        self.run, self.num_classes = run, classes

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, *]."""
        return self.run(x)


def evaluate_program(
    path: Path,
    images: str | EvaluationImages,
    *,
    file: Path | None = None,
    strict: bool = False,
    compute: Compute = Compute(),
    listener: Listener = Listener(),
) -> Judged:
    """Runs a program that `export` wrote over images, and the model that it was made from.

    Args:
        file: that model's; None: the one of the program's name beside it, if it is there.
        strict, compute, listener: see `sparsify.measure.evaluate.evaluate_images`; programs compute on the CPU.

    Raises:
        BadFile: no program that `export` wrote, or a file that it was not made from.
        SparsifyError: its runtime is not installed; a program of features, which has no answers to count.
    """
    if compute.torch_device.type != "cpu" or compute.dtype != "float32":
        raise UsageError("a program is evaluated on the CPU, and takes float32 images")
    format = SUFFIXES[path.suffix]
    writer = exporting.FORMATS[format]
    writer.check_packages()
    about, described, told = _read(path, writer)
    if not described.classes:
        raise SparsifyError(f"{path} gives features: only programs with a classifier are evaluated")
    try:
        run = writer.runner(str(path))
    except Exception as error:
        raise BadFile(f"{path} cannot be run: {one_line(error)}") from None
    if run is None:
        raise SparsifyError(writer.UNCHECKED.replace("not checked", "not evaluated"))
    batch = None if told["batch"] == "any" else int(told["batch"])
    models: dict[str, nn.Module] = {SPARSE: _Runs(answers.of_any_number(run, batch), described.classes)}
    beside = _file_of(path, file, about)
    with contextlib.ExitStack() as form:
        if beside is not None:
            size = described.config["input_size"][-1]
            loaded = checkpoint.read(beside, size, budget=header.parse(about).budget)
            model = exporting.attending(loaded.model, told["attention"])
            form.enter_context(sparse_form(model, compute.backend, compute.kernel_precision))
            models = {DENSE: model, **models}
        result, _ = over(lambda loader: models, described, images, strict, compute, listener)
    return Judged(replace(result, model=path.stem), beside, format, told["attention"], told["precision"])


def _read(path: Path, writer: Any) -> tuple[dict[str, str], Described, dict[str, Any]]:
    """Metadata of a program, what it takes and gives, and how it was exported."""
    try:
        about = writer.metadata(str(path))
        told = {"attention": "sparse", "precision": "float32", **json.loads(about["sparsify.export"])}
        config = json.loads(about["sparsify.preprocessing"])
        names = tuple(json.loads(about.get("sparsify.labels", "[]")))
        classes = header.parse(about).architecture["model_args"].get("num_classes") or 0
        _ = told["batch"], config["input_size"][2], exporting.ATTENTIONS.index(told["attention"])
        return about, Described(config, int(classes), names), told
    except Exception as error:
        raise BadFile(f"{path} is not a program written by 'sparsify export': {one_line(error)}") from None


def _file_of(path: Path, file: Path | None, about: dict[str, str]) -> Path | None:
    """The file that the program was made from: the one that was given, or the one of its name if it is the right one."""
    likely = path.with_suffix(".safetensors") if file is None else file
    right = False
    with contextlib.suppress(BadFile):
        right = checkpoint.metadata(likely)["sparsify.sha256"] == about["sparsify.sha256"]
    if file is not None and not right:
        raise BadFile(f"{field('of')} {file} is not the file that {path} was made from")
    return likely if right else None
