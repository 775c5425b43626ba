"""`sparsify export`: a converted file as an ONNX or PyTorch program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import options
from sparsify.cli.preflight import preflight
from sparsify.errors import UsageError


def export(
    file: options.Model = options.MODEL_FILE,
    format: Annotated[str, typer.Option("--format", help="onnx, or pt2 (torch.export).")] = "onnx",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Program to write.", show_default="FILE's name")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images that every call brings.", show_default="1")
    ] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Calls bring any number of images.")] = False,
    img_size: options.ImgSize = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """The sparse model as a program that runs without sparsify, checked against the model.

    Example: sparsify export model.safetensors --format onnx --dynamic-batch
    """
    if dynamic_batch and batch_size is not None:
        raise UsageError("--dynamic-batch takes any number of images: leave --batch-size out")
    preflight()
    from sparsify.jobs.export import onnx_file, program

    say = options.say(quiet)
    made = program.export(
        file, format, output, batch_size=None if dynamic_batch else batch_size or 1, img_size=img_size, force=force,
        say=say,
    )  # fmt: skip
    print(f"wrote {made.path} ({made.bytes / 1e6:.1f} MB) in {made.seconds:.0f} s")
    say(made.checked.words() if made.checked else onnx_file.UNCHECKED)
