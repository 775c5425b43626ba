"""`sparsify convert`: a name in, one file and its reports out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import completion, options, parsers
from sparsify.cli.helptext import MODEL, RUNNING
from sparsify.cli.preflight import preflight
from sparsify.errors import SparsifyError

KEPT, FORM, LEARNING, FILES = "What is kept", "Form of the sparse attention", "Images and training", "Files"


def convert(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Alias (deit_small), timm name, hf-hub:ORG/NAME, local-dir:DIR or digits.",
            autocompletion=completion.models,
        ),
    ],
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Share of keys that each query attends to, above 0 and up to 1, or dense; or one a block, 0.2,dense,...",
            show_default="the recipe's, 0.1; dense with --token-keep alone",
            rich_help_panel=KEPT,
        ),
    ] = None,
    token_keep: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Share of patch tokens that go on at each stage; or a rate for each block, 1,1,0.8,...",
            show_default="all tokens",
            rich_help_panel=KEPT,
        ),
    ] = None,
    token_stages: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCKS",
            help="Blocks, counted from 1, after whose attention tokens leave.",
            show_default="4,7,10",
            rich_help_panel=KEPT,
        ),
    ] = None,
    token_way: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="How tokens leave: merge, evit or evit-fused.",
            show_default="merge",
            autocompletion=completion.one_of(completion.WAYS),
            rich_help_panel=KEPT,
        ),
    ] = None,
    token_importance: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="What says which tokens matter: fitted (told from the token) or attention (the cls row's).",
            show_default="fitted",
            autocompletion=completion.one_of(completion.IMPORTANCES),
            rich_help_panel=KEPT,
        ),
    ] = None,
    target_macs: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Choose keep and tokens of every block for this share of the dense model's MACs.",
            show_default="none",
            rich_help_panel=KEPT,
        ),
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="The same for this share of its time, on this machine at batch 1.",
            show_default="none",
            rich_help_panel=KEPT,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.", rich_help_panel=FILES)
    ] = options.MODEL_FILE,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite another model's file.", rich_help_panel=FILES)
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Recipe name ('sparsify recipes' lists them) or YAML file.",
            show_default="distill with --data, else calibrate",
            autocompletion=completion.recipes,
            rich_help_panel=LEARNING,
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any field of the recipe: stages.0.epochs=3 (stages count from 0). May be given again.",
            show_default=False,
            rich_help_panel=LEARNING,
        ),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="head-lowrank or token-lowrank (the paper's).",
            show_default="the recipe's, head-lowrank",
            autocompletion=completion.one_of(completion.PREDICTORS),
            rich_help_panel=FORM,
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="R",
            help="Coordinates of the predictor: a mean over all heads, or one for each block.",
            show_default="the recipe's, 16",
            rich_help_panel=FORM,
        ),
    ] = None,
    tail: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What stands for dropped keys: none, mean, cells or clusters.",
            show_default="the recipe's, clusters",
            autocompletion=completion.one_of(completion.TAILS),
            rich_help_panel=FORM,
        ),
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(
            metavar="RxC",
            help="Grid of cells of the tail, rows x columns.",
            show_default="by tokens and keep: 4x3 of 197",
            rich_help_panel=FORM,
        ),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="token: a key set for each query; tile: one for 4x4 neighbours.",
            show_default="token",
            autocompletion=completion.one_of(completion.GRANULARITIES),
            rich_help_panel=FORM,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Folder or timm data set of images to calibrate on and to learn from.",
            show_default="built-in pictures, calibration only",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    val: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Labelled images that decide which weights are written.",
            show_default="a part of --data is held back",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    calib_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Images to calibrate on.",
            show_default="the recipe's, 128",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    calibrate_only: Annotated[
        bool, typer.Option("--calibrate-only", help="Closed form only, no training.", rich_help_panel=LEARNING)
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the interrupted fine-tuning of this output.", rich_help_panel=LEARNING
        ),
    ] = False,
    save_minutes: Annotated[
        float,
        typer.Option(
            min=0, metavar="N", help="Minutes between two saved states of a fine-tuning.", rich_help_panel=LEARNING
        ),
    ] = 5,
    micro_batch: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Most images of a step computed together: less memory, the same result.",
            rich_help_panel=LEARNING,
        ),
    ] = 64,
    weights: options.Weights = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Classes of that checkpoint; 0: features.",
            show_default="read off the file",
            rich_help_panel=MODEL,
        ),
    ] = None,
    img_size: options.ImgSize = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Seed of the choice of images.",
            show_default="the recipe's, 0",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images computed together.", rich_help_panel=RUNNING)
    ] = 16,
    workers: options.Workers = 0,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Turn a pretrained model into a sparse one and write it with its MACs report.

    Example: sparsify convert deit_small --keep 0.1
    """
    from sparsify.recipe import default_recipe, load_recipe

    base = load_recipe(recipe or default_recipe(data is not None and not calibrate_only))
    target = parsers.target(target_macs, target_latency, keep, token_keep)
    tokens = parsers.tokens(token_keep, token_stages, token_way, token_importance, base.sparsity.tokens)
    if token_keep is not None and keep is None and recipe is None:
        keep = "dense"
    chosen = base.override(
        keep=None if target else parsers.keeps(keep, "--keep"), tokens=tokens, predictor=predictor,
        rank=parsers.whole_numbers(rank, "--rank"), tail=tail,
        cells=parsers.rectangle(cells, "--cells"), granularity=granularity, calib_images=calib_images, seed=seed,
    ).set(assignments or [])  # fmt: skip
    if calibrate_only:
        chosen = chosen.without_training()
    parsers.backend(backend)
    preflight()
    from sparsify import processes
    from sparsify.cli import tables
    from sparsify.cli.progress import Reporter
    from sparsify.jobs import convert as conversion

    quiet = quiet or not processes.main()
    with Reporter(quiet) as reporter:
        made = conversion.convert(
            name, chosen, output, weights=weights, num_classes=num_classes, img_size=img_size, images=data, val=val,
            force=force, resume=resume, save_minutes=save_minutes, device=parsers.torch_device(device),
            dtype=parsers.torch_dtype(dtype), batch_size=batch_size, micro_batch=micro_batch, workers=workers,
            backend=backend, target=target, say=options.say(quiet), progress=reporter.update,
        )  # fmt: skip
    if not processes.main():
        return
    if not quiet:
        tables.show(tables.profile_table(made.profile))
    also = f"{made.recipe.name}, " if made.recipe else ""
    run = f"; the run is in {made.run}" if made.run else ""
    print(f"wrote {made.path}, {also}{made.report_json.name} and {made.report_md.name} in {made.seconds:.0f} s{run}")
    if made.tuning is not None and made.tuning.stopped:
        raise SparsifyError(f"{made.tuning.stopped}; {made.path} has the best weights up to there")
