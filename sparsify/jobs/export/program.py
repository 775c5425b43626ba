"""The job behind `sparsify export`: a converted file in, an ONNX or PyTorch (.pt2) program of the sparse form out.

What is exported is the plain PyTorch reference of `sparsify.ops`, operator by operator: it runs without this package and
without the CPU kernels. The answers of a program are compared with the model's before it takes its place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.errors import BadFile, SparsifyError, UsageError, one_line
from sparsify.files import whole
from sparsify.images import datasets
from sparsify.jobs.export import onnx_file, pt2_file
from sparsify.jobs.export.metadata import metadata, output_name
from sparsify.models import checkpoint
from sparsify.models.digits import network
from sparsify.nn import execution

FORMATS = {"onnx": onnx_file, "pt2": pt2_file}
TOLERANCE = 1e-3  # difference of an answer that is pointed out
WRONG = 1e-2  # difference, as a share of the largest number in the model's answers, that no rounding explains
PICTURES = 8  # that program and model are compared on


class Checked(NamedTuple):
    """How a program's answers compare with the model's own.

    Attributes:
        median, most: of the pictures' largest differences.
        apart: of how many pictures the answers differ by more than `TOLERANCE`.
        pictures: how many were compared.
        largest: largest number in the model's answers.
    """

    median: float
    most: float
    apart: int
    pictures: int
    largest: float

    def words(self) -> str:
        """One line for people."""
        line = (
            f"checked against the model on {self.pictures} pictures: answers up to {self.largest:.3g} differ by at most"
        )
        line += f" {self.most:.1e}, in the median by {self.median:.1e}"
        return line + (
            f"; by more than {TOLERANCE:g} on {self.apart}: near ties (docs/export.md)" if self.apart else ""
        )


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path, format: the file.
        batch: images of a call; None: any number.
        bytes: size of the file.
        checked: how its answers compare with the model's; None: nothing on this machine runs it.
        seconds: wall time of the whole.
    """

    path: Path
    format: str
    batch: int | None
    bytes: int
    checked: Checked | None
    seconds: float


def export(
    file: str | Path,
    format: str = "onnx",
    output: str | Path | None = None,
    *,
    batch_size: int | None = 1,
    img_size: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the model of a converted file as a program.

    Args:
        format: onnx or pt2.
        output: a name that ends in .onnx or .pt2; None: the file's own with that ending.
        batch_size: images of a call; None: any number.
        img_size: side in pixels, when it is not the file's.
        force: overwrite an existing output.

    Raises:
        UsageError: an unknown format, another ending, or an image size that the architecture cannot take.
        BadFile: a file that cannot be read or written, or an output that exists.
        SparsifyError: a package that is not installed, a model that the format cannot hold, or a program that answers
            differently; nothing is written then.
    """
    start, file = time.perf_counter(), Path(file)
    if format not in FORMATS:
        raise UsageError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    path = file.with_suffix(f".{format}") if output is None else Path(output)
    if path.suffix != f".{format}":
        raise UsageError(f"--output {path}: a name that ends in .{format} is expected")
    if path.exists() and not force:
        raise BadFile(f"{path} exists: choose another --output or overwrite it with --force")
    kind = FORMATS[format]
    kind.check()
    header = checkpoint.read_header(file)
    model = checkpoint.load(file, img_size).requires_grad_(False)
    kind.check_size(sum(t.nbytes for t in model.state_dict().values()))
    described = checkpoint.metadata(file) | metadata(model, format, batch_size)
    described.pop("format", None)  # safetensors' own
    program = trace(model, batch_size)
    with whole(path) as temporary:
        say(f"writing {path}")
        try:
            kind.write(program, temporary, described, output_name(model))
            run = kind.runner(temporary)
        except (SparsifyError, OSError):
            raise
        except Exception as error:
            raise SparsifyError(f"{file} cannot be written as {format}: {one_line(error)}") from error
        checked = (
            None if run is None else compare(model, run, shown(model, header.architecture["architecture"]), batch_size)
        )
    took = time.perf_counter() - start
    return Exported(path, format, batch_size, path.stat().st_size, checked, took)


def trace(model: nn.Module, batch_size: int | None) -> torch.export.ExportedProgram:
    """The model as a program of PyTorch's operators: images [B, C, H, W] float32 -> logits or features [B, *].

    Args:
        batch_size: B; None: any.

    Raises:
        SparsifyError: torch cannot follow the model.
    """
    dynamic = None if batch_size else {"x": {0: torch.export.Dim("batch", min=1)}}
    example = torch.zeros(batch_size or 2, *datasets.data_config(model)["input_size"])
    try:
        with torch.no_grad(), execution.sparse_form(model):
            return torch.export.export(model, (example,), dynamic_shapes=dynamic)
    except Exception as error:
        raise SparsifyError(f"torch.export cannot follow {type(model).__name__}: {one_line(error)}") from error


def shown(model: nn.Module, architecture: str) -> Tensor:
    """Pictures that program and model are compared on, as the model wants them; noise for unusual channels."""
    config, is_digits = datasets.data_config(model), architecture == network.ARCHITECTURE
    if config["input_size"][0] != 3 and not is_digits:
        return torch.randn(PICTURES, *config["input_size"], generator=torch.Generator().manual_seed(0))
    return next(iter(datasets.builtin_calibration(is_digits, PICTURES, 0, datasets.transform(config))))


def compare(model: nn.Module, run: Callable[[Tensor], Tensor], pictures: Tensor, batch_size: int | None) -> Checked:
    """The answers of program and model to `pictures`.

    Some may differ a little: where two keys, cells or tokens score the same to rounding, another order of summation takes
    the other one, as it does between two backends of the model itself.

    Raises:
        SparsifyError: half of them or more differ by more than that can explain.
    """
    count = len(pictures)
    differences, largest = [], 0.0
    with torch.inference_mode(), execution.sparse_form(model):
        for batch in _batches(pictures, batch_size):
            expected, found = model(batch), run(batch)
            if found.shape != expected.shape:
                raise SparsifyError(
                    f"the program answers {tuple(found.shape)} instead of {tuple(expected.shape)}; nothing written"
                )
            differences += (found - expected).abs().flatten(1).amax(1).tolist()
            largest = max(largest, expected.abs().max().item())
    differences = differences[:count]
    limit = max(TOLERANCE, WRONG * largest)
    wrong = sum(not difference <= limit for difference in differences)
    if 2 * wrong >= count:
        raise SparsifyError(
            f"the program's answers differ from the model's, which go up to {largest:.3g}, by more than {limit:.2g} "
            f"on {wrong} of {count} pictures; nothing written"
        )
    apart = sum(difference > TOLERANCE for difference in differences)
    return Checked(statistics.median(differences), max(differences), apart, count, largest)


def _batches(pictures: Tensor, batch_size: int | None) -> list[Tensor]:
    """`pictures` in batches that the program takes: of its size, the last filled up; of 1 and the rest where any will do."""
    if batch_size is None:
        return [pictures[:1], pictures[1:]]
    filled = torch.cat([pictures, pictures[:1].expand(-len(pictures) % batch_size, -1, -1, -1)])
    return list(filled.split(batch_size))
