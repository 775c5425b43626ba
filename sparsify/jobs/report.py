"""The job behind `sparsify report`: a file, and results of earlier commands about it, on one HTML page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsify import extras
from sparsify.errors import UsageError, field
from sparsify.files.destinations import check_file
from sparsify.files.outputs import write_text
from sparsify.jobs.show import Views, seen
from sparsify.measure.profile import profile
from sparsify.models.original import Which, load_original, opened
from sparsify.processes import Compute, Listener
from sparsify.reports import readback


@dataclass(frozen=True)
class Results:
    """What earlier commands wrote about the file; None: nothing."""

    profile: Path | None = None  # of profile
    evaluation: Path | None = None  # of eval
    sweep: Path | None = None  # of sweep: its JSON, or the folder of it
    measure: bool = False  # measure the latency now, instead of `profile`


@dataclass(frozen=True)
class Page:
    """What `report` wrote."""

    path: Path
    size: int  # characters
    parts: tuple[str, ...]  # what is on it, in words


def report(
    file: Path,
    output: Path,
    results: Results = Results(),
    views: Views = Views(()),
    *,
    dense: str | Path | None = None,
    budget: float | None = None,
    compute: Compute = Compute(),
    listener: Listener = Listener(),
) -> Page:
    """Writes one HTML page about a file that `convert` wrote.

    Args:
        dense: the original, name or checkpoint; None: the file's own weights without sparsity.
        budget: of the file, which schedule; None: the file's first.
        compute: where the model runs.

    Raises:
        SparsifyError: a file, image or result that cannot be read or is another model's, or an output that cannot be
            written.
    """
    from sparsify.reports import page

    if results.measure and results.profile is not None:
        raise UsageError(f"give either {field('profile')}, figures of an earlier run, or {field('measure')}")
    if views.images:
        extras.need("a picture", "matplotlib")
    check_file(output)
    say = listener.say
    evaluation = None if results.evaluation is None else readback.evaluation(results.evaluation)
    swept = None if results.sweep is None else readback.sweep(results.sweep)
    figures = None if results.profile is None else readback.profile(results.profile)
    one = opened(file, say=say, which=Which(budget)).on(compute.torch_device)
    if results.profile is not None and figures is not None:
        readback.check_profile(results.profile, figures, file, one.header, one.model)
    if results.evaluation is not None and evaluation is not None:
        readback.check_evaluation(results.evaluation, evaluation, file, one)
    if dense is not None:  # loaded last: it may be a download
        one = replace(one, dense=load_original(one.header, dense, say=say)).on(compute.torch_device)
    shown = seen(one.model, views, one.dense, listener)
    if figures is None:
        if results.measure:
            say("measuring latency, dense beside sparse")
        how: dict[str, Any] = {"backbone_changed": one.header.backbone_changed, "measure": results.measure}
        figures = profile(one.model, dense=one.dense, compute=compute, **how)
    content = page.Content(file, one.header, figures, evaluation, swept, shown)
    text = page.render(content)
    write_text(output, text)
    return Page(output, len(text), tuple(page.parts(content)))
