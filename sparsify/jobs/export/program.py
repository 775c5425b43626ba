"""The job behind `sparsify export`: a converted file in, an ONNX, OpenVINO or PyTorch (.pt2) program out.

The program holds plain PyTorch operators: it runs without this package and without the CPU kernels. Its outputs are compared
with the model's before the file is written, and its time with the dense model's.

Plain operators of sparse attention are slower than a runtime's dense attention at most sizes. Where the weights are the
dense original's, dense attention over the tokens present is as right, so by default the faster of both is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from sparsify.errors import BadFile, SparsifyError, UsageError, field, one_line
from sparsify.files.locks import reserved
from sparsify.files.outputs import whole
from sparsify.images import datasets
from sparsify.jobs.export import answers, int8, onnx_file, openvino_file, pt2_file
from sparsify.measure.latency import interleaved
from sparsify.models import checkpoint
from sparsify.models.licence import licence_of
from sparsify.nn import execution, graft, schedules
from sparsify.nn.attention import sparse_modules
from sparsify.nn.tokens import comparing
from sparsify.version import __version__

FORMATS: dict[str, Any] = {"onnx": onnx_file, "openvino": openvino_file, "pt2": pt2_file}
IN_INT8 = ("onnx", "openvino")  # formats
ATTENTIONS = ("auto", "dense", "sparse")
ROUNDS = 7  # of timing
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


class Timed(NamedTuple):
    """Medians of one interleaved run on this machine, of a batch of the program's size (1 if it takes any), in ms."""

    dense: float  # the dense model, in the same runtime and precision
    program: float
    threads: int
    int8: bool = False

    def words(self) -> str:
        """One line for people."""
        ratio = self.dense / self.program
        verdict = f"{ratio:.2f}x as fast as" if ratio >= 1 else f"slower ({ratio:.2f}x) than"
        times = f"{self.program:.3g} ms against {self.dense:.3g} ms"
        same = "the same runtime, int8 too" if self.int8 else "the same runtime"
        return f"measured here, {self.threads} threads: {verdict} the dense model in {same} ({times})"


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    path: Path
    format: str  # one of `FORMATS`
    batch: int | None  # fixed batch size; None: any
    attention: str  # dense or sparse, in blocks that are sparse in the file
    bytes: int  # size of the program, of all its files
    checked: answers.Checked | None  # how its outputs compare with the model's; None: nothing on this machine runs it
    timed: Timed | None  # None: nothing on this machine runs it, or not asked for
    seconds: float  # wall time
    rounded: int8.Rounded | None = None  # what int8 did to the answers; None: the program is float32


class ProgramOptions(TypedDict, total=False):
    """Keywords of `export`: what the program is like."""

    batch_size: int | None
    img_size: int | None
    attention: str
    measure: bool
    int8: bool


def export(
    file: str | Path,
    format: str = "onnx",
    output: str | Path | None = None,
    *,
    budget: float | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **options: Unpack[ProgramOptions],
) -> Exported:
    """Write the model of a converted file as a program.

    Args:
        format: onnx, openvino or pt2.
        output: a name that ends in .onnx, .xml or .pt2; None: that of `file` with that ending.
        budget: see `sparsify.models.checkpoint.read`.
        force: overwrite an existing output.
        batch_size: fixed batch size (1); None: any. img_size: side in pixels; None: the file's.
        attention: of blocks that are sparse in the file. sparse; dense, over the tokens present; auto: the one that is
            faster here, dense where nothing here runs the program, sparse where the file's backbone was changed.
        measure: time the program beside the dense model (True). Without, auto is dense, or sparse of a changed backbone.
        int8: linear layers compute in int8 (False); onnx and openvino only. The dense model it is timed beside does too.

    Raises:
        UsageError: an unknown format or attention, another ending, no image in a batch, dense attention of a backbone that
            was changed, or an image size or budget that does not fit.
        BadFile: a file that cannot be read or written, or an output that exists.
        SparsifyError: a package that is not installed, a model that the format cannot hold, or a program whose outputs
            differ; nothing is written then.
    """
    program = _Program(Path(file), format, say, **options)
    return program.write(program.may_write(output, force), budget)


def export_pair(
    file: str | Path,
    adaptive: float,
    format: str = "onnx",
    output: str | Path | None = None,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **options: Unpack[ProgramOptions],
) -> tuple[Exported, Exported]:
    """Write the two programs of adaptive inference (`sparsify.nn.adaptive`), with the rule in the metadata of both.

    A program has no branches: whoever serves runs the second for the images whose margin is below `margin` in the first.

    Args:
        adaptive: mean cost of an image, a fraction of dense.
        output: of the names STEM.first.onnx and STEM.second.onnx the part STEM.onnx; None: that of `file`.

    Raises:
        SparsifyError: as `export`, and where the file cannot be run adaptively (`Header.rule`).
    """
    program = _Program(Path(file), format, say, **options)
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
    """What `export` was asked for, of which it refuses what is unknown."""

    file: Path
    format: str
    say: Callable[[str], None]
    batch_size: int | None = 1
    img_size: int | None = None
    attention: str = "auto"
    measure: bool = True
    int8: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"{field('format')} {self.format}: expected one of {', '.join(FORMATS)}")
        if self.attention not in ATTENTIONS:
            raise UsageError(f"{field('attention')} {self.attention}: expected one of {', '.join(ATTENTIONS)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch size {self.batch_size}: expected 1 or more")
        if self.int8 and self.format not in IN_INT8:
            raise UsageError(f"{field('int8')}: only {' and '.join(IN_INT8)} programs, not {self.format}")

    @property
    def writer(self) -> Any:
        """The module of the format."""
        return FORMATS[self.format]

    def named(self, output: str | Path | None) -> Path:
        """The name to write, of the right ending."""
        suffix = self.writer.SUFFIX
        path = self.file.with_suffix(suffix) if output is None else Path(output)
        if path.suffix != suffix:
            raise UsageError(f"{field('output')} {path}: a name that ends in {suffix} is expected")
        return path

    def may_write(self, output: str | Path | None, force: bool) -> Path:
        """The name to write, unless something is there."""
        path = self.named(output)
        for each in (path, *map(Path, self.writer.beside(str(path)))):
            if each.exists() and not force:
                raise BadFile(f"{each} exists: choose another {field('output')} or overwrite it with {field('force')}")
        return path

    def write(self, path: Path, budget: float | None, told: Mapping[str, str] = MappingProxyType({})) -> Exported:
        """Writes the program of one budget; told: metadata beside the others."""
        start = time.perf_counter()
        self.writer.check_packages()
        if self.int8:
            self.writer.check_int8()
        files = (str(path), *self.writer.beside(str(path)))
        with reserved(*files):
            loaded = checkpoint.read(self.file, self.img_size, budget=budget)
            self.writer.check_size(sum(t.nbytes for t in loaded.model.state_dict().values()))
            with contextlib.ExitStack() as written:
                temporaries = [written.enter_context(whole(each)) for each in files]
                folder = Path(temporaries[0]).parent
                found = self._chosen(loaded, told, folder)
                if self.int8:
                    found = self._in_int8(loaded, found, folder)
                for each, temporary in zip((found.path, *self.writer.beside(found.path)), temporaries, strict=True):
                    os.replace(each, temporary)
        size, seconds = sum(os.path.getsize(each) for each in files), time.perf_counter() - start
        return Exported(
            path,
            self.format,
            self.batch_size,
            found.attention,
            size,
            found.checked,
            found.timed,
            seconds,
            found.rounded,
        )

    def _chosen(self, loaded: checkpoint.Loaded, told: Mapping[str, str], folder: Path) -> _Candidate:
        """The program to write, made in `folder`, checked and timed."""
        changed = loaded.header.backbone_changed
        if self.attention == "dense" and changed and sparse_modules(loaded.model):
            raise UsageError(f"{field('attention')} dense: this file's weights were fine-tuned with sparse attention")
        attentions = candidates(loaded.model, changed)
        attentions = [self.attention] if self.attention in attentions else attentions
        model = loaded.model.requires_grad_(False)
        found = [self._candidate(loaded, model, attentions[0], told, folder)]
        if not self.measure or found[0].run is None:
            return found[0]
        found += [self._candidate(loaded, model, each, told, folder) for each in attentions[1:]]
        self.say("timing it beside the dense model")
        self.writer.write(
            trace(graft.dense_twin(model), self.batch_size), self._original(folder), {}, output_name(model)
        )
        return self._fastest(found, model, folder)

    def _in_int8(self, loaded: checkpoint.Loaded, found: _Candidate, folder: Path) -> _Candidate:
        """The program with int8 linear layers, judged, and timed beside the dense one with such layers."""
        timed = found.timed is not None
        self.say("rounding linear layers to int8")
        for path in [found.path, *([self._original(folder)] if timed else [])]:
            self.writer.in_int8(path)
        made = found._replace(run=self.writer.runner(found.path))
        if made.run is None:
            return made
        model = loaded.model
        pictures = answers.pictures_for(model, loaded.header.architecture["architecture"], int8.PICTURES)
        rounded = int8.judge(attending(model, found.attention), made.run, pictures, self.batch_size)
        return (self._fastest([made], model, folder) if timed else made)._replace(rounded=rounded)

    def _original(self, folder: Path) -> str:
        """Where the dense model's program lies, to be timed."""
        return str(folder / "original")

    def _fastest(self, found: Sequence[_Candidate], model: nn.Module, folder: Path) -> _Candidate:
        """The fastest of programs, all timed in turns with the dense model's."""
        images = torch.zeros(self.batch_size or 1, *datasets.data_config(model)["input_size"])
        runs = {"original": partial(self.writer.runner(self._original(folder)), images)}
        runs |= {each.attention: partial(each.run, images) for each in found if each.run is not None}
        times = {name: timing.median for name, timing in interleaved(runs, rounds=ROUNDS).items()}
        best = min(found, key=lambda each: times[each.attention])
        timed = Timed(times["original"], times[best.attention], torch.get_num_threads(), self.int8)
        return best._replace(timed=timed)

    def _candidate(
        self, loaded: checkpoint.Loaded, model: nn.Module, attention: str, told: Mapping[str, str], folder: Path
    ) -> _Candidate:
        """The program with that attention, checked against the model that it was made from."""
        header, path, model = loaded.header, str(folder / attention), attending(model, attention)
        described = loaded.metadata | metadata(model, self.format, self.batch_size, attention, self.int8) | dict(told)
        described.pop("format", None)  # safetensors' own
        if header.budget is not None:
            described |= {"sparsify.budget": f"{header.budget:g}", **checkpoint.of_schedule(header)}
        described["sparsify.licence"] = licence_of(header).name or "unknown"  # as of today
        program = trace(model, self.batch_size, self.writer.COMPARES)
        self.say(f"writing {self.format}, {attention} attention")
        try:
            self.writer.write(program, path, described, output_name(model))
            run = self.writer.runner(path)
        except (SparsifyError, OSError):
            raise
        except Exception as error:
            raise SparsifyError(f"{self.file} cannot be written as {self.format}: {one_line(error)}") from error
        if run is None:
            return _Candidate(path, attention, None, None)
        pictures = answers.pictures_for(model, header.architecture["architecture"])
        return _Candidate(path, attention, run, answers.compare(model, run, pictures, self.batch_size))


class _Candidate(NamedTuple):
    """A program that may be written."""

    path: str
    attention: str
    run: Callable[[Tensor], Tensor] | None
    checked: answers.Checked | None
    timed: Timed | None = None
    rounded: int8.Rounded | None = None


def candidates(model: nn.Module, backbone_changed: bool) -> list[str]:
    """The kinds of attention of which `export` by default writes the faster: dense, sparse. Without sparse blocks one."""
    if not sparse_modules(model):
        return ["dense"]
    return ["sparse"] if backbone_changed else ["dense", "sparse"]


def attending(model: nn.Module, attention: str) -> nn.Module:
    """The model with that attention in its sparse blocks; parameters are shared."""
    return schedules.densely(model) if attention == "dense" else model


def output_name(model: nn.Module) -> str:
    """`logits`, or `features` of a model without a classifier."""
    return "logits" if getattr(model, "num_classes", 0) else "features"


def metadata(
    model: nn.Module, format: str, batch_size: int | None, attention: str, int8: bool = False
) -> dict[str, str]:
    """Metadata beside the file's header: how to feed the program, and what it is.

    sparsify.preprocessing  input_size [C, H, W], mean, std, interpolation, crop_pct, crop_mode: timm's words
    sparsify.export         format, attention (dense or sparse), precision of the linear layers (float32 or int8), batch (a
                            number or "any"), input and output by name, library versions
    sparsify.labels         names of the classes in the order of the logits, where the file has them
    sparsify.budget         fraction of the dense model's cost that the program's schedule was chosen for, if it was
    sparsify.adaptive       of two programs that belong together: first, second, margin, share (`sparsify.nn.adaptive.Rule`)
    """
    config = datasets.data_config(model)
    about = {
        "format": format,
        "attention": attention,
        "precision": "int8" if int8 else "float32",
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


def trace(model: nn.Module, batch_size: int | None, compares: bool = False) -> torch.export.ExportedProgram:
    """The model as a program of PyTorch's operators: images [B, C, H, W] float32 -> logits or features [B, *].

    `batch_size`: B; None: any. `compares`: of the format. Raises `SparsifyError` where torch cannot follow the model.
    """
    dynamic = None if batch_size else {"x": {0: torch.export.Dim("batch", min=1)}}
    example = torch.zeros(batch_size or 2, *datasets.data_config(model)["input_size"])
    try:
        with torch.no_grad(), execution.sparse_form(model), comparing(model, compares):
            return torch.export.export(model, (example,), dynamic_shapes=dynamic)
    except Exception as error:
        raise SparsifyError(f"torch.export cannot follow {type(model).__name__}: {one_line(error)}") from error
