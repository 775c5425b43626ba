"""The job behind `sparsify export`: a converted file in, an ONNX or PyTorch (.pt2) program of the sparse form out.

The program holds the plain PyTorch reference of `sparsify.ops`, operator by operator: it runs without this package and
without the CPU kernels. Its outputs are compared with the model's before the file is written.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.errors import BadFile, SparsifyError, UsageError, field, one_line
from sparsify.files.locks import reserved
from sparsify.files.outputs import whole
from sparsify.images import datasets
from sparsify.images.trainset import builtin_calibration
from sparsify.jobs.export import onnx_file, pt2_file
from sparsify.models import checkpoint
from sparsify.models.digits import network
from sparsify.models.licence import licence_of
from sparsify.nn import execution
from sparsify.version import __version__

FORMATS = {"onnx": onnx_file, "pt2": pt2_file}
TOLERANCE = 1e-3  # difference of an output that is reported
WRONG = 1e-2  # difference, as a fraction of the model's largest output, that no rounding explains
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
PICTURES = 8  # on which program and model are compared


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


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    path: Path
    format: str  # one of `FORMATS`
    batch: int | None  # fixed batch size; None: any
    bytes: int  # size of the file
    checked: Checked | None  # how its outputs compare with the model's; None: nothing on this machine runs it
    seconds: float  # wall time


def export(
    file: str | Path,
    format: str = "onnx",
    output: str | Path | None = None,
    *,
    batch_size: int | None = 1,
    img_size: int | None = None,
    budget: float | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the model of a converted file as a program.

    Args:
        format: onnx or pt2.
        output: a name that ends in .onnx or .pt2; None: that of `file` with that ending.
        batch_size: fixed batch size; None: any. img_size: side in pixels; None: the file's.
        budget: see `sparsify.models.checkpoint.read`.
        force: overwrite an existing output.

    Raises:
        UsageError: an unknown format, another ending, no image in a batch, or an image size or budget that does not fit.
        BadFile: a file that cannot be read or written, or an output that exists.
        SparsifyError: a package that is not installed, a model that the format cannot hold, or a program whose outputs
            differ; nothing is written then.
    """
    program = _Program(Path(file), format, batch_size, img_size, say)
    path = program.may_write(output, force)
    return program.write(path, budget)


def export_pair(
    file: str | Path,
    adaptive: float,
    format: str = "onnx",
    output: str | Path | None = None,
    *,
    batch_size: int | None = 1,
    img_size: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Exported, Exported]:
    """Write the two programs of adaptive inference (`sparsify.nn.adaptive`), with the rule in the metadata of both.

    A program has no branches: whoever serves runs the second for the images whose margin is below `margin` in the first.

    Args:
        adaptive: mean cost of an image, a fraction of dense.
        output: of the names STEM.first.onnx and STEM.second.onnx the part STEM.onnx; None: that of `file`.

    Raises:
        SparsifyError: as `export`, and where the file cannot be run adaptively (`Header.rule`).
    """
    program = _Program(Path(file), format, batch_size, img_size, say)
    stem = program.named(output)
    paths = [
        program.may_write(stem.with_name(f"{stem.stem}.{part}{stem.suffix}"), force) for part in ("first", "second")
    ]
    rule = checkpoint.read_header(program.file).rule(adaptive)
    say(rule.words())
    told = {"sparsify.adaptive": json.dumps(rule._asdict(), sort_keys=True)}
    return program.write(paths[0], rule.first, told), program.write(paths[1], rule.second, told)


@dataclass(frozen=True)
class _Program:
    """What `export` was asked for; an unknown format or a wrong number of images raises `UsageError`."""

    file: Path
    format: str
    batch_size: int | None
    img_size: int | None
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"{field('format')} {self.format}: expected one of {', '.join(FORMATS)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch size {self.batch_size}: expected 1 or more")

    def named(self, output: str | Path | None) -> Path:
        """The name to write, of the right ending."""
        path = self.file.with_suffix(f".{self.format}") if output is None else Path(output)
        if path.suffix != f".{self.format}":
            raise UsageError(f"{field('output')} {path}: a name that ends in .{self.format} is expected")
        return path

    def may_write(self, output: str | Path | None, force: bool) -> Path:
        """The name to write, unless something is there."""
        path = self.named(output)
        if path.exists() and not force:
            raise BadFile(f"{path} exists: choose another {field('output')} or overwrite it with {field('force')}")
        return path

    def write(self, path: Path, budget: float | None, told: Mapping[str, str] = MappingProxyType({})) -> Exported:
        """Writes the program of one budget; told: metadata beside the others."""
        start = time.perf_counter()
        FORMATS[self.format].check_packages()
        with reserved(path):
            loaded = checkpoint.read(self.file, self.img_size, budget=budget)
            checked = _write(loaded, path, self, told)
        return Exported(path, self.format, self.batch_size, path.stat().st_size, checked, time.perf_counter() - start)


def _write(loaded: checkpoint.Loaded, path: Path, asked: _Program, told: Mapping[str, str]) -> Checked | None:
    """Writes the program to `path` if its outputs are the model's; None: nothing on this machine runs it."""
    writer, format, batch_size = FORMATS[asked.format], asked.format, asked.batch_size
    header, model = loaded.header, loaded.model.requires_grad_(False)
    writer.check_size(sum(t.nbytes for t in model.state_dict().values()))
    described = loaded.metadata | metadata(model, format, batch_size) | dict(told)
    described.pop("format", None)  # safetensors' own
    if header.budget is not None:
        described |= {"sparsify.budget": f"{header.budget:g}", **checkpoint.of_schedule(header)}
    described["sparsify.licence"] = licence_of(header).name or "unknown"  # as of today
    program = trace(model, batch_size)
    with whole(path) as temporary:
        asked.say(f"writing {path}")
        try:
            writer.write(program, temporary, described, output_name(model))
            run = writer.runner(temporary)
        except (SparsifyError, OSError):
            raise
        except Exception as error:
            raise SparsifyError(f"{asked.file} cannot be written as {format}: {one_line(error)}") from error
        pictures = _pictures(model, header.architecture["architecture"])
        return None if run is None else compare(model, run, pictures, batch_size)


def output_name(model: nn.Module) -> str:
    """`logits`, or `features` of a model without a classifier."""
    return "logits" if getattr(model, "num_classes", 0) else "features"


def metadata(model: nn.Module, format: str, batch_size: int | None) -> dict[str, str]:
    """Metadata beside the file's header: how to feed the program, and what it is.

    sparsify.preprocessing  input_size [C, H, W], mean, std, interpolation, crop_pct, crop_mode: timm's words
    sparsify.export         format, batch (a number or "any"), input and output by name, library versions
    sparsify.labels         names of the classes in the order of the logits, where the file has them
    sparsify.budget         fraction of the dense model's cost that the program's schedule was chosen for, if it was
    sparsify.adaptive       of two programs that belong together: first, second, margin, share (`sparsify.nn.adaptive.Rule`)
    """
    config = datasets.data_config(model)
    about = {
        "format": format,
        "batch": batch_size or "any",
        "input": onnx_file.INPUT,
        "output": output_name(model),
        "versions": {"sparsify": __version__, "torch": torch.__version__},
    }
    described = {
        "sparsify.preprocessing": json.dumps({key: config[key] for key in PREPROCESSING}, sort_keys=True),
        "sparsify.export": json.dumps(about, sort_keys=True),
    }
    labels = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if labels and isinstance(labels, list | tuple) and len(labels) == getattr(model, "num_classes", 0):
        described["sparsify.labels"] = json.dumps([str(label) for label in labels])
    return described


def trace(model: nn.Module, batch_size: int | None) -> torch.export.ExportedProgram:
    """The model as a program of PyTorch's operators: images [B, C, H, W] float32 -> logits or features [B, *].

    `batch_size`: B; None: any. Raises `SparsifyError` where torch cannot follow the model.
    """
    dynamic = None if batch_size else {"x": {0: torch.export.Dim("batch", min=1)}}
    example = torch.zeros(batch_size or 2, *datasets.data_config(model)["input_size"])
    try:
        with torch.no_grad(), execution.sparse_form(model):
            return torch.export.export(model, (example,), dynamic_shapes=dynamic)
    except Exception as error:
        raise SparsifyError(f"torch.export cannot follow {type(model).__name__}: {one_line(error)}") from error


def _pictures(model: nn.Module, architecture: str) -> Tensor:
    """Pictures [8, C, H, W] to compare program and model on, preprocessed; noise where C is unusual."""
    config, is_digits = datasets.data_config(model), architecture == network.ARCHITECTURE
    if config["input_size"][0] != 3 and not is_digits:
        return torch.randn(PICTURES, *config["input_size"], generator=torch.Generator().manual_seed(0))
    return next(iter(builtin_calibration(is_digits, PICTURES, 0, datasets.transform(config))))


def compare(model: nn.Module, run: Callable[[Tensor], Tensor], pictures: Tensor, batch_size: int | None) -> Checked:
    """Compares the outputs of program and model for `pictures`.

    Some pictures may differ a little: where two keys, cells or tokens score the same to rounding, another order of
    summation selects the other one, as it does between two backends of the model itself.

    Raises:
        SparsifyError: half of the pictures or more differ by more than that can explain.
    """
    count = len(pictures)
    differences, largest = [], 0.0
    with torch.inference_mode(), execution.sparse_form(model):
        for batch in _batches(pictures, batch_size):
            expected, outputs = model(batch), run(batch)
            if outputs.shape != expected.shape:
                shapes = f"{tuple(outputs.shape)} instead of {tuple(expected.shape)}"
                raise SparsifyError(f"the program answers {shapes}; nothing written")
            differences += (outputs - expected).abs().flatten(1).amax(1).tolist()
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
    """`pictures` in batches of the program's size, the last one filled up; for any size, one picture and the rest."""
    if batch_size is None:
        return [pictures[:1], pictures[1:]]
    filled = torch.cat([pictures, pictures[:1].expand(-len(pictures) % batch_size, -1, -1, -1)])
    return list(filled.split(batch_size))
