"""`sparsify report`: one HTML page about a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from sparsify.cli import options, terminal
from sparsify.cli.options import argument, flag, option
from sparsify.cli.preflight import preflight
from sparsify.errors import UsageError
from sparsify.processes import Compute

PROFILE = "Results of 'profile --json'."
SWEEP = "Results of 'sweep': PREFIX.json, or its folder."


def report(
    file: options.LocalModel,
    more_images: Annotated[list[Path] | None, argument("IMAGE", "Image files, with or without --images.")] = None,
    profile: Annotated[Path | None, option("FILE.json", PROFILE, default="MACs are counted now")] = None,
    eval_file: Annotated[Path | None, option("FILE.json", "Results of 'eval --results-file'.", names="--eval")] = None,
    sweep: Annotated[Path | None, option("FOLDER|FILE.json", SWEEP)] = None,
    images: Annotated[list[Path] | None, option("IMAGE", "Image to draw pictures of. Repeatable.")] = None,
    dense: options.Dense = None,
    budget: options.Budget = None,
    query: options.Queries = None,
    layer: options.Layers = None,
    head: options.Heads = None,
    device: options.Device = "cpu",
    measure: Annotated[bool, flag("--measure", "Measure latency now, on this machine.")] = False,
    output: Annotated[Path, option("FILE", "Page to write.", names="--output -o")] = Path("report.html"),
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write one HTML page about a file: settings, MACs, time, accuracy, a sweep and pictures.

    Example: sparsify report model.safetensors --eval results.json
    """
    if measure and profile is not None:
        raise UsageError("give either --profile, figures of an earlier run, or --measure")
    from sparsify.files.destinations import check_file

    check_file(output)
    preflight()
    from sparsify.cli.progress import Reporter
    from sparsify.images import photograph
    from sparsify.jobs import report
    from sparsify.jobs.show import Views
    from sparsify.processes import Listener

    points = [photograph.point(text) for text in query or []]
    views = Views([*(images or []), *(more_images or [])], points, layer, head)
    results = report.Results(profile, eval_file, sweep, measure)
    with Reporter(quiet) as reporter:
        listener = Listener(options.say(quiet), reporter.update)
        page = report.report(
            file, output, results, views, dense=dense, budget=budget, compute=Compute(device), listener=listener
        )
    terminal.line(f"wrote {page.path}, {page.size / 1e6:.1f} MB: {', '.join(page.parts)}")
