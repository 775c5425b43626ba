"""`sparsify report`: one HTML page about a file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from sparsify import extras
from sparsify.cli import options, terminal
from sparsify.cli.options import argument, flag, option
from sparsify.cli.preflight import preflight
from sparsify.errors import UsageError
from sparsify.processes import Compute

PROFILE = "What 'profile --json' wrote."
SWEEP = "What 'sweep' wrote: its PREFIX.json, or the folder of it."


def report(
    file: options.LocalModel,
    more_images: Annotated[list[Path] | None, argument("IMAGE", "Image files, with or without --images.")] = None,
    profile: Annotated[Path | None, option("FILE.json", PROFILE, default="MACs are counted now")] = None,
    eval_file: Annotated[Path | None, option("FILE.json", "What 'eval --results-file' wrote.", names="--eval")] = None,
    sweep: Annotated[Path | None, option("FOLDER|FILE.json", SWEEP)] = None,
    images: Annotated[list[Path] | None, option("IMAGE", "Image to draw what the model does with. Repeatable.")] = None,
    dense: options.Dense = None,
    budget: options.Budget = None,
    query: options.Queries = None,
    layer: options.Layers = None,
    head: options.Heads = None,
    device: options.Device = "cpu",
    measure: Annotated[bool, flag("--measure", "Measure the latency now, on this machine.")] = False,
    output: Annotated[Path, option("FILE", "Page to write.", names="--output -o")] = Path("report.html"),
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write one HTML page about a file: settings, MACs, time, accuracy, a sweep and pictures. It needs no network.

    Example: sparsify report model.safetensors --eval results.json
    """
    if measure and profile is not None:
        raise UsageError("give either --profile, figures of an earlier run, or --measure")
    from sparsify.files.destinations import check_file
    from sparsify.files.outputs import write_text

    check_file(output)
    preflight()
    if images or more_images:
        extras.need("a picture", "matplotlib")
    from sparsify.cli.progress import Reporter
    from sparsify.images import photograph
    from sparsify.jobs.show import look
    from sparsify.measure.profile import profile as measure_profile
    from sparsify.models.original import Which, load_original, opened
    from sparsify.report import page, readback

    say = options.say(quiet)
    points = [photograph.point(text) for text in query or []]
    evaluation = None if eval_file is None else readback.evaluation(eval_file)
    swept = None if sweep is None else readback.sweep(sweep)
    figures = None if profile is None else readback.profile(profile)
    compute = Compute(device)
    one = opened(file, say=say, which=Which(budget)).on(compute.torch_device)
    if profile is not None and figures is not None:
        readback.check_profile(profile, figures, file, one.header, one.model)
    if eval_file is not None and evaluation is not None:
        readback.check_evaluation(eval_file, evaluation, file, one)
    if dense is not None:  # loaded last: it may be a download
        one = replace(one, dense=load_original(one.header, dense, say=say)).on(compute.torch_device)
    with Reporter(quiet) as reporter:
        progress, files = partial(reporter.update, "look"), [*(images or []), *(more_images or [])]
        draw = partial(look, layers=layer, heads=head, dense=one.dense, progress=progress, say=say)
        shown = draw(one.model, files, points)
    if figures is None:
        if measure:
            say("measuring latency, dense beside sparse")
        changed = one.header.backbone_changed
        figures = measure_profile(
            one.model, dense=one.dense, backbone_changed=changed, measure=measure, compute=compute
        )
    content = page.Content(file, one.header, figures, evaluation, swept, shown)
    text = page.render(content)
    write_text(output, text)
    terminal.line(f"wrote {output}, {len(text) / 1e6:.1f} MB: {', '.join(page.parts(content))}")
