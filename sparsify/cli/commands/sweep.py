"""`sparsify sweep`: one model at many settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import completion, options, parsers
from sparsify.cli.helptext import MODEL, RUNNING
from sparsify.cli.preflight import preflight
from sparsify.errors import UsageError


def sweep(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Dense model: alias, timm name, hf-hub:ORG/NAME, local-dir:DIR or digits.",
            autocompletion=completion.models,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images to measure on: labelled folder, timm data set, digits; loose images: agreement only.",
            autocompletion=completion.one_of(["digits"]),
        ),
    ] = None,
    imagenet: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The same: ImageNet root with val/, or its val folder; labels are required."),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Folder or data set to calibrate on; labels are not used.",
            show_default="built-in pictures",
        ),
    ] = None,
    weights: options.Weights = None,
    targets: Annotated[
        str,
        typer.Option(metavar="SHARES", help="Shares of the dense model's MACs to search a schedule for; or none."),
    ] = "0.8,0.7,0.55,0.4",
    keeps: Annotated[
        str,
        typer.Option(metavar="SHARES", help="Shares of keys to measure sparse attention at, all tokens; or none."),
    ] = "0.25,0.1,0.05",
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="PREFIX", help="Start of the names of .md, .json, .png and the folder .recipes."
        ),
    ] = Path("sweep"),
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images of one timed forward pass.", rich_help_panel=RUNNING)
    ] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Images to measure on, drawn by --seed.", show_default="all")
    ] = None,
    calib_images: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Images to calibrate on.", show_default="128")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Seed of the choice of images.", show_default="0")
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Classes of --weights; 0: features.",
            show_default="read off the file",
            rich_help_panel=MODEL,
        ),
    ] = None,
    img_size: options.ImgSize = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    workers: options.Workers = 0,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure accuracy, MACs and time of one model at several keeps and MACs targets: a table and a picture.

    Example: sparsify sweep deit_small --imagenet /data/imagenet --limit 1000
    """
    if (imagenet is None) == (data is None):
        raise UsageError("give the images to measure on: either --imagenet PATH or --data NAME")
    shares = {"targets": parsers.shares(targets, "--targets"), "keeps": parsers.shares(keeps, "--keeps")}
    if not any(shares.values()):
        raise UsageError("--targets none and --keeps none leave nothing to measure")
    from sparsify.recipe import load_recipe

    recipe = load_recipe("calibrate").override(calib_images=calib_images, seed=seed)
    parsers.backend(backend)
    kind, where = parsers.torch_dtype(dtype), parsers.torch_device(device)
    preflight()
    from sparsify.cli import tables
    from sparsify.cli.progress import Reporter
    from sparsify.cli.tables import table
    from sparsify.jobs import sweep as job
    from sparsify.report import sweep as report

    report.can_write(output)
    with Reporter(quiet) as reporter:
        result = job.sweep(
            name, recipe, str(imagenet or data), **shares, must_be_labelled=imagenet is not None, weights=weights,
            num_classes=num_classes, img_size=img_size, calib=calib, limit=limit, batch_size=batch_size, device=where,
            dtype=kind, backend=backend, workers=workers, say=options.say(quiet), progress=reporter.update,
        )  # fmt: skip
    paths, note = report.write(result, output)
    if not quiet:
        tables.show(table(result))
    if note:
        options.say(quiet)(note)
    print(f"wrote {', '.join(str(path) for path in paths)} in {result.seconds:.0f} s")
