"""`sparsify convert`: a name in, one file and its reports out."""

from __future__ import annotations

from sparsify.cli import options, parsers, terminal
from sparsify.errors import SparsifyError


def convert(
    name: options.DenseName,
    keep: options.Keep = None,
    token_keep: options.TokenKeep = None,
    token_stages: options.TokenStages = None,
    token_way: options.TokenWay = None,
    token_importance: options.TokenImportance = None,
    target_macs: options.TargetMacs = None,
    target_latency: options.TargetLatency = None,
    runtime: options.Runtime = "eager",
    output: options.Output = options.MODEL_FILE,
    force: options.Force = False,
    recipe: options.RecipeName = None,
    assignments: options.Assignments = None,
    predictor: options.Predictor = None,
    rank: options.Rank = None,
    tail: options.Tail = None,
    cells: options.Cells = None,
    granularity: options.Granularity = None,
    data: options.TrainData = None,
    val: options.ValData = None,
    calib_images: options.CalibImages = None,
    calibrate_only: options.CalibrateOnly = False,
    allow_nonfinite: options.AllowNonfinite = False,
    resume: options.Resume = False,
    save_minutes: options.SaveMinutes = 5,
    micro_batch: options.MicroBatch = 64,
    weights: options.Weights = None,
    ema: options.Ema = None,
    num_classes: options.NumClasses = None,
    img_size: options.ImgSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
    class_map: options.ClassMap = None,
    seed: options.Seed = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    batch_size: options.BatchSize = 16,
    workers: options.Workers = 0,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Convert a pretrained model to a sparse one; write it and its MACs report.

    Example: sparsify convert deit_small --keep 0.1
    """
    from sparsify.recipe import default_recipe, load_recipe

    target = parsers.target(target_macs, target_latency, keep, token_keep, runtime)
    several = target is not None and len(target.shares) > 1
    base = load_recipe(recipe or default_recipe(data is not None and not calibrate_only and not several))
    tokens = parsers.tokens(token_keep, token_stages, token_way, token_importance, base.sparsity.tokens)
    if token_keep is not None and keep is None and recipe is None:
        keep = "dense"
    chosen = base.override(
        keep=None if target else parsers.keeps(keep),
        tokens=tokens,
        predictor=predictor,
        rank=parsers.whole_numbers(rank, "--rank"),
        tail=tail,
        cells=parsers.rectangle(cells, "--cells"),
        granularity=granularity,
        calib_images=calib_images,
        seed=seed,
    ).set(assignments or [])
    if calibrate_only:
        chosen = chosen.without_training()
    compute = parsers.compute(device, dtype, backend, batch_size=batch_size, micro_batch=micro_batch, workers=workers)
    given = parsers.preprocessing(mean, std, crop_pct, interpolation, class_map)
    from sparsify import processes
    from sparsify.cli import tables
    from sparsify.cli.progress import Reporter
    from sparsify.jobs import convert
    from sparsify.jobs.dense import DenseRequest

    quiet = quiet or not processes.main()
    files = convert.OutputOptions(output, force, resume, save_minutes)
    with Reporter(quiet) as reporter:
        made = convert.convert(
            DenseRequest(name, weights, num_classes, img_size, ema, given, allow_nonfinite),
            chosen,
            files,
            images=convert.ImageSources(data, val),
            target=target,
            compute=compute,
            listener=processes.Listener(options.say(quiet), reporter.update),
        )
    if not processes.main():
        return
    if not quiet:
        tables.show(tables.profile_table(made.profile))
        tables.show(tables.budgets_table(made.header))
    also = f"{made.recipe.name}, " if made.recipe else ""
    run = f"; the run is in {made.run}" if made.run else ""
    reports = " and ".join(files.beside(ending).name for ending in ("report.json", "report.md"))
    terminal.line(f"wrote {made.path}, {also}{reports} in {made.seconds:.0f} s{run}")
    if made.tuning is not None and made.tuning.stopped:
        raise SparsifyError(f"{made.tuning.stopped}; {made.path} has the best weights up to there")
