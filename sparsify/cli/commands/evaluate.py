"""`sparsify eval`: accuracy of a file on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify import processes
from sparsify.cli import completion, options, parsers
from sparsify.cli.helptext import RUNNING
from sparsify.cli.preflight import preflight
from sparsify.errors import UsageError
from sparsify.processes import Compute, Listener


def evaluate(
    file: options.Model = options.MODEL_FILE,
    imagenet: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="ImageNet root with val/, its val folder, or any folder of class folders."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Another labelled set: folder, timm data set name, or digits.",
            autocompletion=completion.one_of(["digits"]),
        ),
    ] = None,
    dense: options.Dense = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images computed together.", rich_help_panel=RUNNING)
    ] = 32,
    img_size: options.ImgSize = None,
    workers: options.Workers = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    kernel_precision: options.KernelPrecision = "input",
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
    results_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the results as .csv or .json.")
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Top-1, top-5 and agreement of the sparse model beside its dense original.

    Under `accelerate launch -m sparsify` or `torchrun -m sparsify` the processes share the images.

    Example: sparsify eval model.safetensors --imagenet /data/imagenet
    """
    if (imagenet is None) == (data is None):
        raise UsageError("give the labelled images: either --imagenet PATH or --data NAME")
    if results_file is not None and results_file.suffix not in (".csv", ".json"):
        raise UsageError(f"--results-file {results_file}: a name that ends in .csv or .json is expected")
    parsers.backend(backend)
    parsers.kernel_precision(kernel_precision)
    quiet = quiet or not processes.main()
    parsers.torch_dtype(dtype)
    where = parsers.torch_device(processes.local_device(device))
    preflight()
    from sparsify.cli import tables
    from sparsify.cli.progress import Reporter
    from sparsify.measure import conditions
    from sparsify.measure import evaluate as evaluation
    from sparsify.models import checkpoint, original
    from sparsify.ops import backends
    from sparsify.report import accuracy

    compute = Compute(where, dtype, backend, kernel_precision, batch_size, workers=workers)
    say = options.say(quiet)
    processes.start(where)
    with processes.agree():
        header, model = checkpoint.read_header(file), checkpoint.load(file, img_size)
        beside = original.load_original(header, dense, img_size, say) if dense else None
    if header.backbone_changed and beside is None:
        say(original.missing(header))
    with Reporter(quiet) as reporter:
        result = evaluation.evaluate_images(
            model,
            str(imagenet or data),
            dense=beside,
            backbone_changed=header.backbone_changed,
            name=file.stem,
            strict=strict,
            compute=compute,
            listener=Listener(say, reporter.update),
        )
    if not quiet:
        tables.show(tables.eval_table(result.as_dict()))
    if results_file is not None and processes.main():
        circumstances = conditions.conditions(
            conditions.EVALUATION,
            compute,
            data=str(imagenet or data),
            backend=backends.describe(backend, kernel_precision, compute.torch_device, compute.torch_dtype),
        )
        circumstances["file_sha256"] = checkpoint.digest_in(file)
        accuracy.write_results(results_file, result.as_dict(), circumstances)
