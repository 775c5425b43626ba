"""`sparsify profile`: MACs and measured latency of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from sparsify.cli import completion, options, parsers
from sparsify.cli.options import flag, option
from sparsify.errors import UsageError

COUNT_AS = "product, or paper: adds the authors' count of MHSA."

AGAINST = (
    "Instead, time the dense and the converted model in these runtimes and compare with the fastest dense one: eager, "
    "compile, onnxruntime, openvino, onnxruntime-int8, openvino-int8, or all that can run here (int8 with --dtype "
    "bfloat16)."
)


def profile(
    file: options.Model = options.MODEL_FILE,
    dense: options.Dense = None,
    batch_size: options.TimedBatch = 1,
    img_size: options.ImgSize = None,
    budget: options.Budget = None,
    adaptive: options.Adaptive = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    kernel_precision: options.KernelPrecision = "input",
    against: Annotated[str | None, option("NAME,...", AGAINST, default="MACs, eager", words=completion.AGAINST)] = None,
    tree: Annotated[bool, flag("--tree", "Show MACs by module.")] = False,
    markdown: Annotated[Path | None, option("FILE", "Write the report as Markdown.")] = None,
    json: Annotated[Path | None, option("FILE", "Write all figures as JSON.")] = None,
    workers: Annotated[int, option("N", "No effect: profile reads no images.", hidden=True, min=0)] = 0,
    no_measure: Annotated[bool, flag("--no-measure", "Count only; measure no times.")] = False,
    count_as: Annotated[str, option("NAME", COUNT_AS, words=["product", "paper"])] = "product",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Count MACs by module and measure latency, dense beside sparse.

    Example: sparsify profile model.safetensors --tree
    """
    runtimes = parsers.runtimes(against)
    asked = {"--adaptive": adaptive is not None, "--tree": tree, "--no-measure": no_measure}
    others = [name for name, given in (asked | {"--count-as": count_as != "product"}).items() if given]
    if runtimes and others:
        raise UsageError(f"--against times one schedule in several runtimes: leave {', '.join(others)} out")
    if adaptive is not None and (tree or count_as != "product"):
        raise UsageError(
            "--adaptive shows the mean and the worst case of two schedules: leave --tree and --count-as out"
        )
    from sparsify.files.destinations import check_file
    from sparsify.files.outputs import write_json, write_text

    for output in filter(None, (markdown, json)):
        check_file(output)
    compute = parsers.compute(device, dtype, backend, kernel_precision, batch_size=batch_size)
    from sparsify.cli import tables
    from sparsify.jobs.against import profile_against
    from sparsify.measure import profile
    from sparsify.measure.adaptive import profile_adaptive
    from sparsify.models.original import Which, opened
    from sparsify.reports import adaptive as report
    from sparsify.reports import against as against_report
    from sparsify.reports.profile import to_markdown

    def tell(figures: Any, table: Callable[[Any], Any], words: Callable[[Any], str]) -> None:
        if not quiet:
            tables.show(table(figures))
        if markdown:
            write_text(markdown, words(figures))
        if json:
            write_json(json, figures.as_dict())

    say = options.say(quiet)
    one = opened(file, dense, img_size, say, Which(budget, adaptive))
    if one.rule is not None:
        figures = profile_adaptive(one.model, measure=not no_measure, compute=compute)
        tell(figures, tables.adaptive_table, report.markdown)
        return
    if one.note:
        say(one.note)
    if runtimes:
        changed = one.header.backbone_changed
        measured = profile_against(
            one.model, runtimes, dense=one.dense, backbone_changed=changed, compute=compute, say=say
        )
        tell(measured, tables.against_table, against_report.markdown)
        return
    result = profile.profile(
        one.model,
        dense=one.dense,
        backbone_changed=one.header.backbone_changed,
        measure=not no_measure,
        compute=compute,
        count_as=count_as,
    )
    tell(result, tables.profile_table, to_markdown)
    if tree and not quiet:
        tables.show(tables.module_tree(result))
