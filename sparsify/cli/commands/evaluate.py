"""`sparsify eval`: accuracy of a file on labelled images, and how far it agrees with dense on any."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from sparsify import processes
from sparsify.cli import options, parsers, terminal
from sparsify.cli.options import flag, option
from sparsify.errors import SparsifyError, UsageError

IMAGENET = "ImageNet root with val/, its val folder, or any folder of class folders; labels are required."
OF = "File that an exported program (.onnx, .xml, .pt2) was made from, to compare with."
DATA = "Instead of --imagenet: folder, .tar, timm data set or digits. Without class folders: agreement only."


def evaluate(
    file: options.Model = options.MODEL_FILE,
    imagenet: Annotated[str | None, option("DIR", IMAGENET)] = None,
    data: Annotated[str | None, option("DATA", DATA, words=["digits"])] = None,
    no_labels: options.NoLabels = False,
    limit: options.Limit = None,
    seed: options.LimitSeed = 0,
    dense: options.Dense = None,
    of: Annotated[Path | None, option("FILE", OF, default="the file of the same name beside it")] = None,
    batch_size: options.BatchSize = 32,
    img_size: options.ImgSize = None,
    budget: options.Budget = None,
    adaptive: options.Adaptive = None,
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
    class_map: options.ClassMap = None,
    workers: options.Workers = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    kernel_precision: options.KernelPrecision = "input",
    strict: Annotated[bool, flag("--strict", "Stop at the first image that cannot be read.")] = False,
    results_file: Annotated[Path | None, option("FILE", "Write the results as .csv or .json.")] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compare a sparse model with its dense original (top-1, top-5, agreement), or an exported program with its file.

    Unlabelled images (directly in a folder) give agreement and KL; for feature models cosine and shared neighbours.

    `accelerate launch -m sparsify` and `torchrun -m sparsify` divide the images among processes.

    Example: sparsify eval model.safetensors --imagenet /data/imagenet
    """
    use_labels = parsers.use_labels(imagenet, data, no_labels)
    if results_file is not None and results_file.suffix not in (".csv", ".json"):
        raise UsageError(f"--results-file {results_file}: a name that ends in .csv or .json is expected")
    if results_file is not None and processes.main():
        from sparsify.files.destinations import check_file

        check_file(results_file)
    quiet = quiet or not processes.main()
    device = processes.local_device(device)
    compute = parsers.compute(device, dtype, backend, kernel_precision, batch_size=batch_size, workers=workers)
    from sparsify.cli import tables
    from sparsify.cli.progress import Reporter
    from sparsify.images.measured import EvaluationImages
    from sparsify.jobs import judge
    from sparsify.measure.conditions import EVALUATION, conditions
    from sparsify.measure.evaluate import evaluate_images
    from sparsify.models.original import Which, opened
    from sparsify.ops import backends
    from sparsify.reports.accuracy import write_results

    say, images = options.say(quiet), EvaluationImages(str(imagenet or data), use_labels, limit, seed)
    of_images = {"data": images.path, "limit": limit, "seed": seed if limit else None}
    if file.suffix in judge.SUFFIXES:
        with Reporter(quiet) as reporter:
            listener = processes.Listener(say, reporter.update)
            judged = judge.evaluate_program(file, images, file=of, strict=strict, compute=compute, listener=listener)
        figures = judged.evaluation.as_dict()
        if not quiet:
            tables.show(tables.eval_table(figures, ("file", "program")))
            beside = judged.file.name if judged.file else "nothing: its file is not there (--of FILE)"
            rounded = ", int8 linear layers" if judged.precision == "int8" else ""
            terminal.line(f"program: {judged.format}, {judged.attention} attention{rounded}; compared with {beside}")
        if results_file is not None and processes.main():
            told = conditions(EVALUATION, compute, **of_images, backend=judged.format, budget=None)
            write_results(results_file, figures, told | {"program": file.name})
        return
    processes.start(device)
    with processes.agree():
        one = opened(file, dense, img_size, say, Which(budget, adaptive))
        parsers.preprocessing(mean, std, crop_pct, interpolation, class_map).apply(one.lead)
    if one.note:
        say(one.note)
    with Reporter(quiet) as reporter:
        result = evaluate_images(
            one.model,
            images,
            dense=one.dense,
            backbone_changed=one.header.backbone_changed,
            name=file.stem,
            strict=strict,
            compute=compute,
            listener=processes.Listener(say, reporter.update),
        )
    if not quiet:
        tables.show(tables.eval_table(result.as_dict()))
        if one.rule is not None and result.ran_twice is not None:
            cost = one.rule.first + result.ran_twice / 100 * one.rule.second
            terminal.line(f"{result.ran_twice:.1f} % ran twice: {cost:.3f} of dense in the mean of these images")
    if results_file is not None and processes.main():
        described = backends.describe(backend, kernel_precision, compute.torch_device, compute.torch_dtype)
        circumstances = conditions(EVALUATION, compute, **of_images, backend=described, budget=one.header.budget)
        write_results(results_file, result.as_dict(), circumstances | {"file_sha256": one.digest})
    if result.nonfinite:
        problem = f"{result.nonfinite:,} of {result.images:,} images give outputs that are not finite (NaN or infinity)"
        raise SparsifyError(f"{problem}; they count as wrong and as disagreement: look at the weights, or at --dtype")
