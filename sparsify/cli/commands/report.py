"""`sparsify report`: one HTML page about a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import options
from sparsify.cli.commands.show import Heads, Layers, Queries
from sparsify.cli.preflight import preflight
from sparsify.errors import BadFile, UsageError


def report(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File that 'convert' wrote.")],
    more_images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE...]", help="Image files, with or without --images.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="What 'profile --json' wrote.", show_default="MACs are counted now"),
    ] = None,
    eval_file: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE.json", help="What 'eval --results-file' wrote.")
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER|FILE.json", help="What 'sweep' wrote: its PREFIX.json, or the folder of it."),
    ] = None,
    images: Annotated[
        list[Path] | None, typer.Option("--images", metavar="IMAGE...", help="Images to draw what the model does with.")
    ] = None,
    dense: options.Dense = None,
    query: Queries = None,
    layer: Layers = None,
    head: Heads = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the latency now, on this machine.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Page to write.")] = Path(
        "report.html"
    ),
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write one HTML page about a file: settings, MACs, time, accuracy, a sweep and pictures. It needs no network.

    Example: sparsify report model.safetensors --eval results.json
    """
    if measure and profile is not None:
        raise UsageError("give either --profile, figures of an earlier run, or --measure")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise BadFile(f"cannot write {output}: a file name in a folder that exists is expected")
    preflight()
    from sparsify.cli.progress import Reporter
    from sparsify.files import write_text
    from sparsify.images import photograph
    from sparsify.jobs import show
    from sparsify.measure import profile as profiling
    from sparsify.models import checkpoint, original
    from sparsify.report import page, readback

    say = options.say(quiet)
    points = [photograph.point(text) for text in query or []]
    evaluation = None if eval_file is None else readback.evaluation(eval_file)
    swept = None if sweep is None else readback.sweep(sweep)
    figures = None if profile is None else readback.profile(profile)
    header, model = checkpoint.read_header(file), checkpoint.load(file)
    if profile is not None and figures is not None:
        readback.check_profile(profile, figures, file, header, model)
    if eval_file is not None and evaluation is not None:
        readback.check_evaluation(eval_file, evaluation, file, model)
    beside = original.load_original(header, dense, None, say) if dense else None
    with Reporter(quiet) as reporter:
        shown = show.look(
            model, [*(images or []), *(more_images or [])], points, layers=layer, heads=head, dense=beside,
            progress=lambda done, total: reporter.update("look", done, total),
        )  # fmt: skip
    if figures is None:
        if measure:
            say("measuring latency, dense beside sparse")
        figures = profiling.profile(
            model, dense=beside, backbone_changed=header.backbone_changed, measure=measure
        )  # fmt: skip
    content = page.Content(file, header, figures, evaluation, swept, shown)
    text = page.render(content)
    write_text(output, text)
    print(f"wrote {output}, {len(text.encode()) / 1e6:.1f} MB: {', '.join(page.parts(content))}")
