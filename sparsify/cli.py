"""The command line: parses, calls one job, renders its result. torch is imported inside the commands only.

Exit codes: 0 done; 1 a bad file, data set or model; 2 a bad option, argument or name; 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify import __version__, options
from sparsify.errors import SparsifyError, UsageError
from sparsify.preflight import preflight

INTERRUPTED = 130

app = typer.Typer(
    name="sparsify",
    help="Pretrained timm Vision Transformers with per-image sparse attention (Sparsifiner, CVPR 2023).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"sparsify {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of every command follow the command."""


@app.command()
def convert(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Alias (deit_small), timm name, hf-hub:ORG/NAME, local-dir:DIR or digits."),
    ],
    keep: Annotated[
        str | None,
        typer.Option(
            help="Share of keys that each query attends to, above 0 and up to 1, or dense; or one a block, 0.2,dense,...",
            show_default="the recipe's, 0.1; dense with --token-keep alone",
        ),
    ] = None,
    token_keep: Annotated[
        str | None,
        typer.Option(
            help="Share of patch tokens that go on at each stage; or a rate for each block, 1,1,0.8,...",
            show_default="all tokens",
        ),
    ] = None,
    token_stages: Annotated[
        str | None,
        typer.Option(help="Blocks, counted from 1, after whose attention tokens leave.", show_default="4,7,10"),
    ] = None,
    token_way: Annotated[
        str | None,
        typer.Option(help="How tokens leave: merge, evit or evit-fused.", show_default="merge"),
    ] = None,
    target_macs: Annotated[
        float | None,
        typer.Option(
            help="Choose keep and tokens of every block for this share of the dense model's MACs.", show_default="none"
        ),
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(help="The same for this share of its time, on this machine at batch 1.", show_default="none"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = options.MODEL_FILE,
    force: Annotated[bool, typer.Option("--force", help="Overwrite another model's file.")] = False,
    recipe: Annotated[
        str, typer.Option(help="Recipe name ('sparsify recipes' lists them) or YAML file.")
    ] = "calibrate",
    predictor: Annotated[
        str | None,
        typer.Option(help="head-lowrank or token-lowrank (the paper's).", show_default="the recipe's, head-lowrank"),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Coordinates of the predictor: a mean over all heads, or one for each block.",
            show_default="the recipe's, 16",
        ),
    ] = None,
    tail: Annotated[
        str | None,
        typer.Option(
            help="What stands for dropped keys: none, mean, cells or clusters.", show_default="the recipe's, clusters"
        ),
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(help="Grid of cells of the tail, ROWSxCOLUMNS.", show_default="by tokens and keep: 4x3 of 197"),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(help="token: a key set for each query; tile: one for 4x4 neighbours.", show_default="token"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder or timm data set of images to calibrate on; labels are not used.",
            show_default="built-in pictures",
        ),
    ] = None,
    calib_images: Annotated[
        int | None, typer.Option(min=1, help="Images to calibrate on.", show_default="the recipe's, 128")
    ] = None,
    calibrate_only: Annotated[
        bool, typer.Option("--calibrate-only", help="Closed form only, no training (all that there is so far).")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(help="Your own checkpoint of that architecture, .safetensors or .pth.", show_default="timm's"),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=0, help="Classes of that checkpoint.", show_default="read off the file")
    ] = None,
    img_size: options.ImgSize = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the choice of images.", show_default="the recipe's, 0")
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed together.")] = 16,
    workers: options.Workers = 0,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Turn a pretrained model into a sparse one and write it with its MACs report."""
    from sparsify.recipe import load_recipe

    base = load_recipe(recipe)
    target = options.target(target_macs, target_latency, keep, token_keep)
    tokens = options.tokens(token_keep, token_stages, token_way, base.sparsity.tokens)
    if token_keep is not None and keep is None and recipe == "calibrate":
        keep = "dense"
    chosen = base.override(
        keep=None if target else options.keeps(keep, "--keep"), tokens=tokens, predictor=predictor,
        rank=options.whole_numbers(rank, "--rank"), tail=tail,
        cells=options.rectangle(cells, "--cells"), granularity=granularity, calib_images=calib_images, seed=seed,
    )  # fmt: skip
    options.backend(backend)
    preflight()
    from sparsify import conversion
    from sparsify.report import tables
    from sparsify.report.progress import Reporter

    with Reporter(quiet) as reporter:
        made = conversion.convert(
            name, chosen, output, weights=weights, num_classes=num_classes, img_size=img_size, images=data, force=force,
            device=options.torch_device(device), dtype=options.torch_dtype(dtype), batch_size=batch_size,
            workers=workers, backend=backend, target=target, say=_say(quiet), progress=reporter.update,
        )  # fmt: skip
    if not quiet:
        tables.show(tables.profile_table(made.profile))
    also = f"{made.recipe.name}, " if made.recipe else ""
    print(f"wrote {made.path}, {also}{made.report_json.name} and {made.report_md.name} in {made.seconds:.0f} s")


@app.command()
def profile(
    file: options.Model = options.MODEL_FILE,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one measured forward pass.")] = 1,
    img_size: options.ImgSize = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    kernel_precision: options.KernelPrecision = "input",
    tree: Annotated[bool, typer.Option("--tree", help="Show MACs by module.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every figure as JSON.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="No effect: profile reads no images.")] = 0,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Theoretical figures only.")] = False,
    count_as: Annotated[str, typer.Option(help="product, or paper: the authors' MHSA accounting besides.")] = "product",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """MACs by module and measured latency, dense beside sparse."""
    options.torch_dtype(dtype)
    options.backend(backend)
    options.kernel_precision(kernel_precision)
    options.torch_device(device)
    preflight()
    from sparsify import checkpoint, profiling
    from sparsify.report import files, tables

    model = checkpoint.load(file, img_size)
    result = profiling.profile(
        model, batch_size=batch_size, dtype=dtype, device=device, backend=backend, kernel_precision=kernel_precision,
        backbone_changed=checkpoint.read_header(file).backbone_changed, measure=not no_measure, count_as=count_as,
    )  # fmt: skip
    if not quiet:
        tables.show(tables.profile_table(result))
        if tree:
            tables.show(tables.module_tree(result))
    if markdown:
        files.write_text(markdown, files.to_markdown(result))
    if json:
        files.write_json(json, result.as_dict())


@app.command("eval")
def eval_(
    file: options.Model = options.MODEL_FILE,
    imagenet: Annotated[
        str | None, typer.Option(help="ImageNet root with val/, its val folder, or any folder of class folders.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Another labelled set: folder, timm data set name, or digits.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed together.")] = 32,
    img_size: options.ImgSize = None,
    workers: options.Workers = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    kernel_precision: options.KernelPrecision = "input",
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
    results_file: Annotated[Path | None, typer.Option(help="Write the results as .csv or .json.")] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Top-1, top-5 and agreement of the sparse model beside its dense original."""
    if (imagenet is None) == (data is None):
        raise UsageError("give the labelled images: either --imagenet PATH or --data NAME")
    if results_file is not None and results_file.suffix not in (".csv", ".json"):
        raise UsageError(f"--results-file {results_file}: a name that ends in .csv or .json is expected")
    options.backend(backend)
    options.kernel_precision(kernel_precision)
    kind, where = options.torch_dtype(dtype), options.torch_device(device)
    preflight()
    from sparsify import checkpoint, evaluation
    from sparsify.report import files, tables
    from sparsify.report.progress import Reporter

    model = checkpoint.load(file, img_size)
    with Reporter(quiet) as reporter:
        result = evaluation.evaluate_images(
            model, str(imagenet or data), name=file.stem, batch_size=batch_size, workers=workers, dtype=kind,
            device=where, strict=strict, backend=backend, kernel_precision=kernel_precision, say=_say(quiet),
            progress=lambda done, total: reporter.update("eval", done, total),
        )  # fmt: skip
    if not quiet:
        tables.show(tables.eval_table(result.as_dict()))
    if results_file is not None:
        files.write_results(results_file, result.as_dict())


@app.command()
def sweep(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Dense model: alias, timm name, hf-hub:ORG/NAME, local-dir:DIR or digits."),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to measure on: labelled folder, timm data set, digits; loose images: agreement only."
        ),
    ] = None,
    imagenet: Annotated[
        str | None, typer.Option(help="The same: ImageNet root with val/, or its val folder; labels are required.")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(help="Folder or data set to calibrate on; labels are not used.", show_default="built-in pictures"),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Your own checkpoint of that architecture, .safetensors or .pth.", show_default="timm's"),
    ] = None,
    targets: Annotated[
        str, typer.Option(help="Shares of the dense model's MACs to search a schedule for; or none.")
    ] = "0.8,0.7,0.55,0.4",
    keeps: Annotated[
        str, typer.Option(help="Shares of keys to measure sparse attention at, all tokens; or none.")
    ] = "0.25,0.1,0.05",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PREFIX of the files .md, .json, .png and the folder .recipes.")
    ] = Path("sweep"),
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one timed forward pass.")] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Images to measure on, drawn by --seed.", show_default="all")
    ] = None,
    calib_images: Annotated[int | None, typer.Option(min=1, help="Images to calibrate on.", show_default="128")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the choice of images.", show_default="0")] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=0, help="Classes of --weights; 0: features.", show_default="read off the file")
    ] = None,
    img_size: options.ImgSize = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    workers: options.Workers = 0,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure accuracy, MACs and time of one model at several keeps and MACs targets: a table and a picture."""
    if (imagenet is None) == (data is None):
        raise UsageError("give the images to measure on: either --imagenet PATH or --data NAME")
    shares = {"targets": options.shares(targets, "--targets"), "keeps": options.shares(keeps, "--keeps")}
    if not any(shares.values()):
        raise UsageError("--targets none and --keeps none leave nothing to measure")
    from sparsify.recipe import load_recipe

    recipe = load_recipe("calibrate").override(calib_images=calib_images, seed=seed)
    options.backend(backend)
    kind, where = options.torch_dtype(dtype), options.torch_device(device)
    preflight()
    from sparsify import sweep as job
    from sparsify.report import sweep as report
    from sparsify.report import tables
    from sparsify.report.progress import Reporter

    report.can_write(output)
    with Reporter(quiet) as reporter:
        result = job.sweep(
            name, recipe, str(imagenet or data), **shares, must_be_labelled=imagenet is not None, weights=weights,
            num_classes=num_classes, img_size=img_size, calib=calib, limit=limit, batch_size=batch_size, device=where,
            dtype=kind, backend=backend, workers=workers, say=_say(quiet), progress=reporter.update,
        )  # fmt: skip
    paths, note = report.write(result, output)
    if not quiet:
        tables.show(report.table(result))
    if note:
        print(note)
    print(f"wrote {', '.join(str(path) for path in paths)} in {result.seconds:.0f} s")


@app.command()
def models(pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with *.")] = "") -> None:
    """List the models that can be converted."""
    preflight()
    from sparsify import zoo

    found = zoo.listing(pattern)
    if not found:
        raise UsageError(f"no model matches '{pattern}': 'sparsify models' lists all")
    for name, note in found:
        print(f"{name}  {note}".rstrip())


@app.command()
def recipes(
    action: Annotated[str, typer.Argument(metavar="[show]", help="'show' prints one recipe.")] = "",
    name: Annotated[str, typer.Argument(help="Recipe to show.")] = "",
) -> None:
    """List the recipes, or print one."""
    from sparsify.recipe import load_recipe, recipe_names, recipe_text

    if action not in ("", "show") or bool(action) != bool(name):
        raise UsageError("'sparsify recipes' lists the recipes, 'sparsify recipes show NAME' prints one")
    if action:
        print(recipe_text(name), end="")
        return
    for each in recipe_names():
        print(f"{each}  {load_recipe(each).description}")


@app.command("build-kernels")
def build_kernels(
    force: Annotated[bool, typer.Option("--force", help="Compile again, also what failed before.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the compiler's commands and all it said.")] = False,
) -> None:
    """Compile the CPU kernels now instead of at their first use."""
    preflight()
    from sparsify.ops import cpu
    from sparsify.ops.cpu.build import build

    built = build(force=force, verbose=verbose, say=_say(False))
    if reason := built.reason or cpu.available():
        raise SparsifyError(f"the CPU kernels cannot be used, the reference is: {reason}")
    print(f"library: {built.path}")
    print(f"instruction set of this machine: {cpu.isa()}")
    print(f"built in {built.seconds:.0f} s" if built.seconds else "already built")


def _say(quiet: bool) -> Any:
    return (lambda line: None) if quiet else (lambda line: print(line, flush=True))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: every expected error is one line on stderr and an exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)  # fvcore traces with it
    warnings.filterwarnings("ignore", message="sparse attention is computed by")  # the commands say it themselves
    command = typer.main.get_command(app)
    try:
        code = command.main(args=given, prog_name="sparsify", standalone_mode=False)
    except SparsifyError as error:
        code = _fail(str(error), error.exit_code, "--debug" in given)
    except typer.TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        code = _fail(message, 2, False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        code = 0
    except Exception as error:
        code = _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1, "--debug" in given)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code
        _fail("interrupted; nothing half-written is left", INTERRUPTED, False)
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
