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

    Args:
        path: file that `convert` wrote.
        format: onnx, openvino or pt2.
        output: a name that ends in .onnx, .xml or .pt2; None: that of `path` with that ending.
        budget: of the file, which schedule; None: the file's first.
        force: overwrite an existing output.
        say: called with a line now and then.

    Keyword Args:
        batch_size: fixed batch size; None: any. 1 if it is not given.
        img_size: side in pixels; None: the file's.
        attention: of blocks that are sparse in the file: sparse; dense, over the tokens present; auto: the one that is
            faster here, dense where nothing here runs the program, sparse where the file's backbone was changed.
        measure: time the program beside the dense model (True). Without, auto is dense, or sparse of a changed backbone.
        int8: linear layers compute in int8 (False); onnx and openvino only.

    Returns:
        The paths that were written and what was measured.

    Raises:
        UsageError: an unknown format or attention, another ending, or an image size or budget that does not fit.
        BadFile: a file that cannot be read or written, or an output that exists.
        SparsifyError: a package that is not installed, a model that the format cannot hold, or a program whose outputs
            differ; nothing is written then.
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

    Args:
        path: file that `convert` wrote for several targets.
        adaptive: mean cost of an image, a fraction of the dense model's (`load`).
        format: onnx, openvino or pt2.
        output: STEM.onnx of the names STEM.first.onnx and STEM.second.onnx; None: that of `path`.
        force: overwrite existing outputs.
        say: called with a line now and then.

    Keyword Args:
        batch_size: fixed batch size; None: any. 1 if it is not given.
        img_size: side in pixels; None: the file's.
        attention: of blocks that are sparse in the file: sparse; dense, over the tokens present; auto: the one that is
            faster here, dense where nothing here runs the program, sparse where the file's backbone was changed.
        measure: time the program beside the dense model (True). Without, auto is dense, or sparse of a changed backbone.
        int8: linear layers compute in int8 (False); onnx and openvino only.

    Returns:
        Both programs: of the cheap schedule and of the costlier one.

    Raises:
        UsageError: an unknown format or attention, another ending, or an image size or budget that does not fit.
        BadFile: a file that cannot be read or written, or an output that exists.
        SparsifyError: a package that is not installed, a model that the format cannot hold, or a program whose outputs
            differ; nothing is written then.
    """
    return export_pair_job(path, adaptive, format, output, force=force, say=in_python(say), **options)
