"""`sparsify profile`: MACs and measured latency of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import completion, options, parsers
from sparsify.cli.helptext import RUNNING
from sparsify.cli.preflight import preflight
from sparsify.processes import Compute


def profile(
    file: options.Model = options.MODEL_FILE,
    dense: options.Dense = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images of one measured forward pass.", rich_help_panel=RUNNING)
    ] = 1,
    img_size: options.ImgSize = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    kernel_precision: options.KernelPrecision = "input",
    tree: Annotated[bool, typer.Option("--tree", help="Show MACs by module.")] = False,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as Markdown.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every figure as JSON.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="No effect: profile reads no images.", hidden=True)] = 0,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Theoretical figures only.")] = False,
    count_as: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="product, or paper: the authors' MHSA accounting besides.",
            autocompletion=completion.one_of(["product", "paper"]),
        ),
    ] = "product",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """MACs by module and measured latency, dense beside sparse.

    Example: sparsify profile model.safetensors --tree
    """
    parsers.torch_dtype(dtype)
    parsers.backend(backend)
    parsers.kernel_precision(kernel_precision)
    parsers.torch_device(device)
    preflight()
    from sparsify.cli import tables
    from sparsify.files import write_json, write_text
    from sparsify.measure import profile as profiling
    from sparsify.models import checkpoint, original
    from sparsify.report.profile import to_markdown

    say = options.say(quiet)
    header, model = checkpoint.read_header(file), checkpoint.load(file, img_size)
    beside = original.load_original(header, dense, img_size, say) if dense else None
    if header.backbone_changed and beside is None:
        say(original.missing(header))
    result = profiling.profile(
        model,
        dense=beside,
        backbone_changed=header.backbone_changed,
        measure=not no_measure,
        compute=Compute(device, dtype, backend, kernel_precision, batch_size),
        count_as=count_as,
    )
    if not quiet:
        tables.show(tables.profile_table(result))
        if tree:
            tables.show(tables.module_tree(result))
    if markdown:
        write_text(markdown, to_markdown(result))
    if json:
        write_json(json, result.as_dict())
