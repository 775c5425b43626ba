"""`sparsify export`: a converted file as an ONNX or PyTorch program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from sparsify.cli import options, terminal
from sparsify.cli.options import flag, option
from sparsify.cli.preflight import preflight
from sparsify.errors import UsageError

ATTENTION = (
    "Form of the file's sparse blocks: sparse; dense (over the remaining tokens); auto: the faster one on this machine, "
    "dense if the program cannot run here, sparse if the weights were fine-tuned."
)


def export(
    file: options.Model = options.MODEL_FILE,
    format: Annotated[str, option("NAME", "onnx, openvino, or pt2 (torch.export).")] = "onnx",
    output: Annotated[
        Path | None, option("FILE", "Program to write.", None, "FILE's name", names="--output -o")
    ] = None,
    batch_size: Annotated[int | None, option("N", "Fixed batch size.", default="1", min=1)] = None,
    dynamic_batch: Annotated[bool, flag("--dynamic-batch", "Allow any batch size.")] = False,
    img_size: options.ImgSize = None,
    budget: options.Budget = None,
    adaptive: options.Adaptive = None,
    attention: Annotated[str, option("KIND", ATTENTION)] = "auto",
    int8: Annotated[bool, flag("--int8", "Compute linear layers in int8 (onnx, openvino).")] = False,
    no_measure: Annotated[bool, flag("--no-measure", "Do not time the program beside the dense model.")] = False,
    force: Annotated[bool, flag("--force", "Overwrite an existing file.")] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Export a program that runs without sparsify, check it against the model and time it beside the dense one.

    Example: sparsify export model.safetensors --format onnx --dynamic-batch
    """
    if dynamic_batch and batch_size is not None:
        raise UsageError("--dynamic-batch takes any number of images: leave --batch-size out")
    preflight()
    from sparsify.jobs.export import program

    say, size = options.say(quiet), None if dynamic_batch else batch_size or 1
    how: Any = {"attention": attention, "measure": not no_measure, "int8": int8}
    shape: Any = {"batch_size": size, "img_size": img_size, "force": force, "say": say, **how}
    if adaptive is not None and budget is not None:
        raise UsageError("give either --budget, one program, or --adaptive, two of them")
    if adaptive is None:
        programs = [program.export(file, format, output, budget=budget, **shape)]
    else:
        programs = [*program.export_pair(file, adaptive, format, output, **shape)]
    for made in programs:
        terminal.line(f"wrote {made.path} ({made.bytes / 1e6:.1f} MB) in {made.seconds:.0f} s")
        say(f"{made.attention} attention")
        say(made.checked.words() if made.checked else program.FORMATS[format].UNCHECKED)
        if made.rounded:
            terminal.line(made.rounded.words())
        if made.timed:
            terminal.line(made.timed.words())
