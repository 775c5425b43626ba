"""A file to programs that run without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from sparsify.api.arguments import in_python
from sparsify.jobs.export.program import Exported, ProgramOptions
from sparsify.jobs.export.program import export as export_job
from sparsify.jobs.export.program import export_pair as export_pair_job
from sparsify.processes import Say


def export(
    path: str | Path,
    format: str = "onnx",
    output: str | Path | None = None,
    *,
    budget: float | None = None,
    force: bool = False,
    say: Say | None = None,
    **options: Unpack[ProgramOptions],
) -> Exported:
    """Write the model of a file as a program without this package, ONNX, OpenVINO's or torch.export's; docs/export.md.

    Arguments and errors are those of `sparsify.jobs.export.program.export`; `say` is called with a line now and then.
    """
    return export_job(path, format, output, budget=budget, force=force, say=in_python(say), **options)


def export_pair(
    path: str | Path,
    adaptive: float,
    format: str = "onnx",
    output: str | Path | None = None,
    *,
    force: bool = False,
    say: Say | None = None,
    **options: Unpack[ProgramOptions],
) -> tuple[Exported, Exported]:
    """Write the two programs of adaptive inference, with the rule in their metadata.

    Arguments and errors are those of `sparsify.jobs.export.program.export_pair`; `say` as in `export`.
    """
    return export_pair_job(path, adaptive, format, output, force=force, say=in_python(say), **options)
