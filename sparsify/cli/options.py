"""Options of the commands as annotated types, with units and defaults. Small commands declare what they alone have.

A help text that does not fit on the line of its option stands above it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.cli import completion, terminal
from sparsify.cli.helptext import FILES, FORM, INPUT, KEPT, LEARNING, MODEL, RUNNING, TALK
from sparsify.errors import as_options
from sparsify.processes import DTYPES

MODEL_FILE = Path("model.safetensors")


def option(
    metavar: str | None,
    help: str,
    group: str | None = None,  # heading that the option stands under in `--help`
    default: str | bool = True,  # how the default is shown; True: as it is, False: not at all
    words: completion.Completer | Sequence[str] | None = None,  # what the shell completes to
    names: str = "",  # of the option, between spaces; none: the parameter's
    **more: Any,
) -> Any:
    """`typer.Option` in one line."""
    more |= {"max": more.get("max", 10**9)} if "min" in more else {}  # no number of thousands of digits
    more |= {"metavar": metavar, "help": help, "show_default": default, "rich_help_panel": group}
    return typer.Option(*names.split(), autocompletion=_completer(words), **more)


def flag(names: str, help: str, group: str | None = None) -> Any:
    """An option without a value."""
    return option(None, help, group, names=names)


def argument(metavar: str, help: str, default: str | bool = True, words: Any = None, **more: Any) -> Any:
    """`typer.Argument` in one line; `default`, `words`: as for `option`."""
    return typer.Argument(metavar=metavar, help=help, show_default=default, autocompletion=_completer(words), **more)


def _completer(words: completion.Completer | Sequence[str] | None) -> completion.Completer | None:
    return words if words is None or callable(words) else completion.one_of(words)


def model_file(name: str | Path) -> Path:
    """The file of a FILE argument; a hub's name is downloaded (errors: `sparsify.models.hub.local`)."""
    from sparsify.models import hub

    return hub.local(name if str(name).startswith((*hub.SCHEMES, "local-dir:")) else Path(name))


def say(quiet: bool) -> Callable[[str], None]:
    """What takes lines for the person at the terminal: prints them on stderr at once, or drops them where `quiet`."""
    return (lambda line: None) if quiet else (lambda line: terminal.note(as_options(line)))


# of several commands

_MODEL = "File that 'convert' wrote, or hf-hub:ORG/NAME."
Model = Annotated[Path, argument("FILE", _MODEL, parser=model_file)]
LocalModel = Annotated[Path, argument("FILE", "File that 'convert' wrote.")]
_NAME = "Dense model: alias (deit_small), timm name, ORG/NAME on the Hub, folder or digits."
DenseName = Annotated[str, argument("NAME", _NAME, words=completion.models)]
_DENSE = "Dense original to compare with: name, or checkpoint. Needed for fine-tuned files only."
Dense = Annotated[str | None, option("NAME|FILE", _DENSE, MODEL, "the file's own weights", completion.models)]
_WEIGHTS = "Your own checkpoint of that architecture: .safetensors, .pth or *.index.json."
Weights = Annotated[Path | None, option("FILE", _WEIGHTS, MODEL, "timm's")]
_EMA = "Of --weights: the averaged weights (EMA), or the others."
Ema = Annotated[bool | None, option(None, _EMA, MODEL, "averaged, where there are any", names="--ema/--no-ema")]
_CLASSES = "Classes of --weights; 0: features."
NumClasses = Annotated[int | None, option("N", _CLASSES, MODEL, "read off the file", min=0)]
_SIDE = "Side of the image in pixels."
ImgSize = Annotated[int | None, option("PIXELS", _SIDE, MODEL, "the model's own", min=1, max=10_000)]
_MEAN = "Mean of pixels, 0 to 1: one number, or one for each channel, 0.5,0.5,0.5."
Mean = Annotated[str | None, option("M", _MEAN, INPUT, "the model's")]
Std = Annotated[str | None, option("S", "Standard deviation of pixels, the same way.", INPUT, "the model's")]
_CROP = "Side of the central crop, as a fraction of the shorter side."
CropPct = Annotated[float | None, option("SHARE", _CROP, INPUT, "the model's")]
_INTERPOLATION = "Of resizing: bicubic, bilinear, nearest, box, hamming, lanczos."
Interpolation = Annotated[str | None, option("NAME", _INTERPOLATION, INPUT, "the model's")]
_CLASS_MAP = "Names of all classes in their order: .txt, one on each line, or .json."
ClassMap = Annotated[Path | None, option("FILE", _CLASS_MAP, INPUT, "folders in natural order")]
Device = Annotated[str, option("NAME", "Device of torch: cpu, cuda, cuda:1, mps.", RUNNING, words=completion.DEVICES)]
Dtype = Annotated[str, option("NAME", "float32, bfloat16 or float16.", RUNNING, words=DTYPES)]
_BACKEND = "Implementation of sparse attention: auto (the CPU kernels if they can run), cpu, reference."
Backend = Annotated[str, option("NAME", _BACKEND, RUNNING, words=completion.BACKENDS)]
_PRECISION = "What the CPU kernels store: input (the model's dtype), or bf16 for float32 models too."
KernelPrecision = Annotated[str, option("NAME", _PRECISION, RUNNING, words=completion.KERNEL_PRECISIONS)]
BatchSize = Annotated[int, option("N", "Images computed together.", RUNNING, min=1)]
TimedBatch = Annotated[int, option("N", "Images of one timed forward pass.", RUNNING, min=1)]
Workers = Annotated[int, option("N", "Processes that read images; 0 reads in this one.", RUNNING, min=0, max=1000)]
Quiet = Annotated[bool, flag("--quiet -q", "Print nothing but the names of the files written, and errors.", TALK)]
Debug = Annotated[bool, flag("--debug", "Show the traceback of an error.", TALK)]

# of convert

_KEEP = (
    "Fraction of keys that each query attends to, above 0 and up to 1, or dense; what it costs is spent over the heads. "
    "Or one for each block, 0.2,dense,..."
)
Keep = Annotated[str | None, option("SHARE", _KEEP, KEPT, "the recipe's, 0.1; dense with --token-keep alone")]
_TOKEN_KEEP = "Fraction of patch tokens kept at each stage; or a rate for each block, 1,1,0.8,..."
TokenKeep = Annotated[str | None, option("SHARE", _TOKEN_KEEP, KEPT, "all tokens")]
_STAGES = "Blocks, counted from 1, after whose attention tokens are removed."
TokenStages = Annotated[str | None, option("BLOCKS", _STAGES, KEPT, "by depth: 4,7,10 of 12")]
_WAY = "How tokens are removed: merge, evit or evit-fused."
TokenWay = Annotated[str | None, option("WAY", _WAY, KEPT, "merge", completion.WAYS)]
_IMPORTANCE = "Token importance: fitted (predicted from the token) or attention (cls row)."
TokenImportance = Annotated[str | None, option("KIND", _IMPORTANCE, KEPT, "fitted", completion.IMPORTANCES)]
_MACS = (
    "Choose keep and tokens of every block for this fraction of the dense model's MACs. Several, 0.7,0.55,0.4: one file "
    "with a schedule for each; the first is in use."
)
TargetMacs = Annotated[str | None, option("SHARE,...", _MACS, KEPT, "none")]
_LATENCY = "The same for fractions of its time, on this machine at batch 1."
TargetLatency = Annotated[str | None, option("SHARE,...", _LATENCY, KEPT, "none")]
_FOR = "Where the model is to run: eager, compile, onnxruntime, openvino; the last two: fewer tokens, dense attention."
Runtime = Annotated[str, option("NAME", _FOR, KEPT, words=completion.RUNTIMES, names="--for")]
Output = Annotated[Path, option("FILE", "File to write.", FILES, names="--output -o")]
Force = Annotated[bool, flag("--force", "Overwrite another model's file.", FILES)]
_RECIPE = "Recipe name ('sparsify recipes' lists them) or YAML file."
_RECIPE_USED = "distill with --data, else calibrate"
RecipeName = Annotated[str | None, option("NAME|FILE", _RECIPE, LEARNING, _RECIPE_USED, completion.recipes)]
_SET = "Any field of the recipe: stages.0.epochs=3 (stages count from 0). Repeatable."
Assignments = Annotated[list[str] | None, option("FIELD=VALUE", _SET, LEARNING, False, names="--set")]
_PREDICTOR = "head-lowrank or token-lowrank (the paper's)."
Predictor = Annotated[str | None, option("NAME", _PREDICTOR, FORM, "the recipe's, head-lowrank", completion.PREDICTORS)]
_RANK = "Coordinates of the predictor; what they cost is spent over the heads. Or one for each block."
Rank = Annotated[str | None, option("R", _RANK, FORM, "the recipe's, 16")]
_TAIL = "What stands for dropped keys: none, mean, cells or clusters."
Tail = Annotated[str | None, option("NAME", _TAIL, FORM, "the recipe's, clusters", completion.TAILS)]
_CELLS = "Grid of cells of the tail, rows x columns."
Cells = Annotated[str | None, option("RxC", _CELLS, FORM, "by tokens and keep: 4x3 of 197")]
_GRANULARITY = "token: a key set for each query; tile: one for 4x4 neighbours."
Granularity = Annotated[str | None, option("NAME", _GRANULARITY, FORM, "token", completion.GRANULARITIES)]
_DATA = "Folder or timm data set of images to calibrate on and to learn from."
TrainData = Annotated[str | None, option("DATA", _DATA, LEARNING, "built-in pictures, calibration only")]
_VAL = "Labelled images that decide which weights are written."
ValData = Annotated[str | None, option("DATA", _VAL, LEARNING, "a part of --data is held back")]
CalibImages = Annotated[int | None, option("N", "Images to calibrate on.", LEARNING, "the recipe's, 128", min=1)]
_NONFINITE = "Convert weights with NaN or infinity, which are refused otherwise."
AllowNonfinite = Annotated[bool, flag("--allow-nonfinite", _NONFINITE, MODEL)]
CalibrateOnly = Annotated[bool, flag("--calibrate-only", "Closed form only, no training.", LEARNING)]
Resume = Annotated[bool, flag("--resume", "Continue the interrupted fine-tuning of this output.", LEARNING)]
SaveMinutes = Annotated[float, option("N", "Minutes between two saved states of a fine-tuning.", LEARNING, min=0)]
_MICRO_BATCH = "Maximum images per forward/backward pass (gradient accumulation)."
MicroBatch = Annotated[int, option("N", _MICRO_BATCH, LEARNING, min=1)]
Seed = Annotated[
    int | None, option("N", "Seed of the choice of images.", LEARNING, "the recipe's, 0", min=0, max=2**63 - 1)
]

# of sweep

_MEASURED = "Images to measure on: labelled folder, timm data set, digits; loose images: agreement only."
SweepData = Annotated[str | None, option("DATA", _MEASURED, words=["digits"])]
_IMAGENET = "The same: ImageNet root with val/, or its val folder; labels are required."
SweepImageNet = Annotated[str | None, option("DIR", _IMAGENET)]
_CALIB = "Folder or data set to calibrate on; labels are not used."
CalibData = Annotated[str | None, option("DATA", _CALIB, default="built-in pictures")]
Targets = Annotated[str, option("SHARES", "Fractions of the dense model's MACs to search a schedule for; or none.")]
Keeps = Annotated[str, option("SHARES", "Fractions of keys to measure sparse attention at, all tokens; or none.")]
_BUDGET = "Which schedule of a file made for several targets: 0.55; 1: dense attention, all tokens."
Budget = Annotated[float | None, option("SHARE", _BUDGET, MODEL, "the file's first", min=0, max=1)]
_ADAPTIVE = "Mean cost of an image, a fraction of dense: a cheap schedule, and a dearer one again for unsure images."
Adaptive = Annotated[float | None, option("SHARE", _ADAPTIVE, MODEL, "one schedule", min=0, max=1)]
_PREFIX = "Start of the names of .md, .json, .png and the folder .recipes."
SweepOutput = Annotated[Path, option("PREFIX", _PREFIX, names="--output -o")]
_LIMIT = "Images to measure on, drawn by --seed and spread over the classes."
Limit = Annotated[int | None, option("N", _LIMIT, default="all", min=1)]
LimitSeed = Annotated[int, option("N", "Seed of the choice of images.", min=0, max=2**63 - 1)]
_NO_LABELS = "Do not use labels: no accuracy, only how far the models agree."
NoLabels = Annotated[bool, flag("--no-labels", _NO_LABELS)]
SweepCalibImages = Annotated[int | None, option("N", "Images to calibrate on.", default="128", min=1)]
SweepSeed = Annotated[int | None, option("N", "Seed of the choice of images.", default="0", min=0, max=2**63 - 1)]

# of show and report

_LAYERS, _DRAWN = "Layers to draw keys of, counted from 1; or all.", "4 of those with sparse attention"
Layers = Annotated[str | None, option("N,N,...", _LAYERS, default=_DRAWN, names="--layer")]
_HEADS = "Heads, counted from 1; or all."
Heads = Annotated[str | None, option("N,N,...", _HEADS, default="at most 6", names="--head")]
_QUERIES = (
    "Patch whose keys are drawn: whole pixels of the image (120,80), or fractions of its sides with a point "
    "(0.5,0.25). Repeatable."
)
_MIDDLE = "the middle, and near the top left corner"
Queries = Annotated[list[str] | None, option("X,Y", _QUERIES, default=_MIDDLE, names="--query")]
