"""`sparsify sweep`: one model at many settings."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sparsify.cli import options, parsers, terminal
from sparsify.errors import UsageError


def sweep(
    name: options.DenseName,
    data: options.SweepData = None,
    imagenet: options.SweepImageNet = None,
    calib: options.CalibData = None,
    weights: options.Weights = None,
    ema: options.Ema = None,
    targets: options.Targets = "0.8,0.7,0.55,0.4",
    keeps: options.Keeps = "0.25,0.1,0.05",
    output: options.SweepOutput = Path("sweep"),
    batch_size: options.TimedBatch = 1,
    no_labels: options.NoLabels = False,
    limit: options.Limit = None,
    calib_images: options.SweepCalibImages = None,
    seed: options.SweepSeed = None,
    num_classes: options.NumClasses = None,
    img_size: options.ImgSize = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    workers: options.Workers = 0,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure accuracy, MACs and time of one model at several keeps and MACs targets; write a table and a plot.

    Example: sparsify sweep deit_small --imagenet /data/imagenet --limit 1000
    """
    use_labels = parsers.use_labels(imagenet, data, no_labels)
    target_shares, keep_shares = parsers.shares(targets, "--targets"), parsers.shares(keeps, "--keeps")
    if not target_shares and not keep_shares:
        raise UsageError("--targets none and --keeps none leave nothing to measure")
    from sparsify.recipe import load_recipe

    recipe = load_recipe("calibrate").override(calib_images=calib_images, seed=seed)
    compute = parsers.compute(device, dtype, backend, batch_size=batch_size, workers=workers)
    from sparsify.cli import tables
    from sparsify.cli.progress import Reporter
    from sparsify.images.measured import EvaluationImages
    from sparsify.jobs import sweep
    from sparsify.jobs.dense import DenseRequest
    from sparsify.processes import Listener

    say = options.say(quiet)
    with Reporter(quiet) as reporter:
        run = partial(
            sweep.sweep,
            DenseRequest(name, weights, num_classes, img_size, ema),
            recipe,
            EvaluationImages(str(imagenet or data), use_labels, limit, recipe.seed),
            targets=target_shares,
            keeps=keep_shares,
            calib=calib,
            compute=compute,
            listener=Listener(say, reporter.update),
        )
        made = sweep.written(output, run)
    if not quiet:
        tables.show(tables.sweep_table(made.sweep))
    if made.note:
        say(made.note)
    terminal.line(f"wrote {', '.join(str(path) for path in made.paths)} in {made.sweep.seconds:.0f} s")
