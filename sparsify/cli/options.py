"""Options of the commands as annotated types, with units and defaults. Small commands declare what they alone have."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.cli import completion
from sparsify.cli.helptext import FILES, FORM, KEPT, LEARNING, MODEL, RUNNING, TALK
from sparsify.errors import as_options
from sparsify.processes import DTYPES

MODEL_FILE = Path("model.safetensors")


def option(
    metavar: str | None,
    help: str,
    group: str | None = None,
    default: str | bool = True,
    words: completion.Completer | Sequence[str] | None = None,
    names: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    """`typer.Option` in one line.

    Args:
        group: heading that the option stands under in `--help`.
        default: how the default is shown; True: as it is, False: not at all.
        words: what the shell completes to.
        names: of the option; none: the parameter's.
    """
    completer = words if words is None or callable(words) else completion.one_of(words)
    return typer.Option(
        *names,
        metavar=metavar,
        help=help,
        show_default=default,
        autocompletion=completer,
        rich_help_panel=group,
        **more,
    )


def flag(name: str, help: str, group: str | None = None) -> Any:
    """An option without a value."""
    return typer.Option(name, help=help, rich_help_panel=group)


def model_file(name: str | Path) -> Path:
    """The file of a FILE argument; a hub's name is downloaded.

    Raises:
        SparsifyError: see `sparsify.models.hub.local`.
    """
    from sparsify.models import hub

    return hub.local(name if str(name).startswith((*hub.SCHEMES, "local-dir:")) else Path(name))


def say(quiet: bool) -> Callable[[str], None]:
    """What takes lines for the person at the terminal: prints them on stderr at once, or drops them where `quiet`."""
    return (lambda line: None) if quiet else (lambda line: print(as_options(line), file=sys.stderr, flush=True))


# of several commands

Model = Annotated[
    Path, typer.Argument(metavar="FILE", parser=model_file, help="File that 'convert' wrote, or hf-hub:ORG/NAME.")
]
LocalModel = Annotated[Path, typer.Argument(metavar="FILE", help="File that 'convert' wrote.")]
DenseName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Dense model: alias (deit_small), timm name, hf-hub:ORG/NAME, local-dir:DIR or digits.",
        autocompletion=completion.models,
    ),
]
Dense = Annotated[
    str | None,
    option(
        "NAME|FILE",
        "Dense original to compare with: name, or checkpoint. Needed for fine-tuned files only.",
        MODEL,
        "the file's own weights",
        completion.models,
        ("--dense",),
    ),
]
Weights = Annotated[
    Path | None, option("FILE", "Your own checkpoint of that architecture, .safetensors or .pth.", MODEL, "timm's")
]
NumClasses = Annotated[
    int | None, option("N", "Classes of that checkpoint; 0: features.", MODEL, "read off the file", min=0)
]
ImgSize = Annotated[int | None, option("PIXELS", "Side of the image in pixels.", MODEL, "the model's own", min=1)]
Device = Annotated[str, option("NAME", "Device of torch: cpu, cuda, cuda:1, mps.", RUNNING, words=completion.DEVICES)]
Dtype = Annotated[str, option("NAME", "float32, bfloat16 or float16.", RUNNING, words=DTYPES)]
Backend = Annotated[
    str,
    option(
        "NAME",
        "Implementation of sparse attention: auto (the CPU kernels if they can run), cpu, reference.",
        RUNNING,
        words=completion.BACKENDS,
    ),
]
KernelPrecision = Annotated[
    str,
    option(
        "NAME",
        "What the CPU kernels store: input (the model's dtype), or bf16 for float32 models too.",
        RUNNING,
        words=completion.KERNEL_PRECISIONS,
    ),
]
BatchSize = Annotated[int, option("N", "Images computed together.", RUNNING, min=1)]
TimedBatch = Annotated[int, option("N", "Images of one timed forward pass.", RUNNING, min=1)]
Workers = Annotated[int, option("N", "Processes that read images; 0 reads in this one.", RUNNING, min=0)]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print nothing but the names of the files written, and errors.", rich_help_panel=TALK
    ),
]
Debug = Annotated[bool, flag("--debug", "Show the traceback of an error.", TALK)]

# of convert

Keep = Annotated[
    str | None,
    option(
        "SHARE",
        "Fraction of keys that each query attends to, above 0 and up to 1, or dense; or one for each block, 0.2,dense,...",
        KEPT,
        "the recipe's, 0.1; dense with --token-keep alone",
    ),
]
TokenKeep = Annotated[
    str | None,
    option(
        "SHARE",
        "Fraction of patch tokens kept at each stage; or a rate for each block, 1,1,0.8,...",
        KEPT,
        "all tokens",
    ),
]
TokenStages = Annotated[
    str | None, option("BLOCKS", "Blocks, counted from 1, after whose attention tokens are removed.", KEPT, "4,7,10")
]
TokenWay = Annotated[
    str | None, option("WAY", "How tokens are removed: merge, evit or evit-fused.", KEPT, "merge", completion.WAYS)
]
TokenImportance = Annotated[
    str | None,
    option(
        "KIND",
        "Token importance: fitted (predicted from the token) or attention (cls row).",
        KEPT,
        "fitted",
        completion.IMPORTANCES,
    ),
]
TargetMacs = Annotated[
    float | None,
    option("SHARE", "Choose keep and tokens of every block for this fraction of the dense model's MACs.", KEPT, "none"),
]
TargetLatency = Annotated[
    float | None, option("SHARE", "The same for this fraction of its time, on this machine at batch 1.", KEPT, "none")
]
Output = Annotated[Path, option("FILE", "File to write.", FILES, names=("--output", "-o"))]
Force = Annotated[bool, flag("--force", "Overwrite another model's file.", FILES)]
RecipeName = Annotated[
    str | None,
    option(
        "NAME|FILE",
        "Recipe name ('sparsify recipes' lists them) or YAML file.",
        LEARNING,
        "distill with --data, else calibrate",
        completion.recipes,
    ),
]
Assignments = Annotated[
    list[str] | None,
    option(
        "FIELD=VALUE",
        "Any field of the recipe: stages.0.epochs=3 (stages count from 0). Repeatable.",
        LEARNING,
        False,
        names=("--set",),
    ),
]
Predictor = Annotated[
    str | None,
    option(
        "NAME",
        "head-lowrank or token-lowrank (the paper's).",
        FORM,
        "the recipe's, head-lowrank",
        completion.PREDICTORS,
    ),
]
Rank = Annotated[
    str | None,
    option(
        "R", "Coordinates of the predictor: a mean over all heads, or one for each block.", FORM, "the recipe's, 16"
    ),
]
Tail = Annotated[
    str | None,
    option(
        "NAME",
        "What stands for dropped keys: none, mean, cells or clusters.",
        FORM,
        "the recipe's, clusters",
        completion.TAILS,
    ),
]
Cells = Annotated[
    str | None, option("RxC", "Grid of cells of the tail, rows x columns.", FORM, "by tokens and keep: 4x3 of 197")
]
Granularity = Annotated[
    str | None,
    option(
        "NAME",
        "token: a key set for each query; tile: one for 4x4 neighbours.",
        FORM,
        "token",
        completion.GRANULARITIES,
    ),
]
TrainData = Annotated[
    str | None,
    option(
        "DATA",
        "Folder or timm data set of images to calibrate on and to learn from.",
        LEARNING,
        "built-in pictures, calibration only",
    ),
]
ValData = Annotated[
    str | None,
    option("DATA", "Labelled images that decide which weights are written.", LEARNING, "a part of --data is held back"),
]
CalibImages = Annotated[int | None, option("N", "Images to calibrate on.", LEARNING, "the recipe's, 128", min=1)]
CalibrateOnly = Annotated[bool, flag("--calibrate-only", "Closed form only, no training.", LEARNING)]
Resume = Annotated[bool, flag("--resume", "Continue the interrupted fine-tuning of this output.", LEARNING)]
SaveMinutes = Annotated[float, option("N", "Minutes between two saved states of a fine-tuning.", LEARNING, min=0)]
MicroBatch = Annotated[
    int, option("N", "Maximum images per forward/backward pass (gradient accumulation).", LEARNING, min=1)
]
Seed = Annotated[int | None, option("N", "Seed of the choice of images.", LEARNING, "the recipe's, 0", min=0)]

# of sweep

SweepData = Annotated[
    str | None,
    option(
        "DATA",
        "Images to measure on: labelled folder, timm data set, digits; loose images: agreement only.",
        words=["digits"],
    ),
]
SweepImageNet = Annotated[
    str | None, option("DIR", "The same: ImageNet root with val/, or its val folder; labels are required.")
]
CalibData = Annotated[
    str | None, option("DATA", "Folder or data set to calibrate on; labels are not used.", default="built-in pictures")
]
Targets = Annotated[str, option("SHARES", "Fractions of the dense model's MACs to search a schedule for; or none.")]
Keeps = Annotated[str, option("SHARES", "Fractions of keys to measure sparse attention at, all tokens; or none.")]
SweepOutput = Annotated[
    Path, option("PREFIX", "Start of the names of .md, .json, .png and the folder .recipes.", names=("--output", "-o"))
]
Limit = Annotated[int | None, option("N", "Images to measure on, drawn by --seed.", default="all", min=1)]
SweepCalibImages = Annotated[int | None, option("N", "Images to calibrate on.", default="128", min=1)]
SweepSeed = Annotated[int | None, option("N", "Seed of the choice of images.", default="0", min=0)]

# of show and report

Layers = Annotated[
    str | None,
    option(
        "N,N,...",
        "Layers to draw keys of, counted from 1; or all.",
        default="4 of those with sparse attention",
        names=("--layer",),
    ),
]
Heads = Annotated[
    str | None, option("N,N,...", "Heads, counted from 1; or all.", default="at most 6", names=("--head",))
]
Queries = Annotated[
    list[str] | None,
    option(
        "X,Y",
        "Patch whose keys are drawn: whole pixels of the image (120,80), or fractions of its sides with a point "
        "(0.5,0.25). Repeatable.",
        default="the middle, and near the top left corner",
        names=("--query",),
    ),
]
