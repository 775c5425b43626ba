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
_DENSE = "Dense original to compare with: model name or checkpoint. Only fine-tuned files need it."
Dense = Annotated[str | None, option("NAME|FILE", _DENSE, MODEL, "the file's own weights", completion.models)]
_WEIGHTS = "Your own checkpoint of this architecture: .safetensors, .pth or *.index.json."
Weights = Annotated[Path | None, option("FILE", _WEIGHTS, MODEL, "timm's")]
_EMA = "Take the averaged (EMA) or the plain weights of --weights."
Ema = Annotated[bool | None, option(None, _EMA, MODEL, "averaged, if the file has them", names="--ema/--no-ema")]
_CLASSES = "Number of classes of --weights; 0: a feature model."
NumClasses = Annotated[int | None, option("N", _CLASSES, MODEL, "read from the file", min=0)]
_SIDE = "Image size in pixels (square)."
ImgSize = Annotated[int | None, option("PIXELS", _SIDE, MODEL, "the model's own", min=1, max=10_000)]
_MEAN = "Pixel mean, 0 to 1: one number, or one per channel (0.5,0.5,0.5)."
Mean = Annotated[str | None, option("M", _MEAN, INPUT, "the model's")]
Std = Annotated[str | None, option("S", "Pixel standard deviation, in the same form.", INPUT, "the model's")]
_CROP = "Side of the centre crop, as a fraction of the image's shorter side."
CropPct = Annotated[float | None, option("SHARE", _CROP, INPUT, "the model's")]
_INTERPOLATION = "Resizing filter: bicubic, bilinear, nearest, box, hamming, lanczos."
Interpolation = Annotated[str | None, option("NAME", _INTERPOLATION, INPUT, "the model's")]
_CLASS_MAP = "Class names in the model's order: .txt with one per line, or .json."
ClassMap = Annotated[Path | None, option("FILE", _CLASS_MAP, INPUT, "folders in natural order")]
Device = Annotated[str, option("NAME", "torch device: cpu, cuda, cuda:1, mps.", RUNNING, words=completion.DEVICES)]
Dtype = Annotated[str, option("NAME", "float32, bfloat16 or float16.", RUNNING, words=DTYPES)]
_BACKEND = "Implementation of sparse attention: auto (the CPU kernels where they can run), cpu, reference."
Backend = Annotated[str, option("NAME", _BACKEND, RUNNING, words=completion.BACKENDS)]
_PRECISION = "Storage dtype of the CPU kernels: input (the model's dtype), or bf16 for float32 models too."
KernelPrecision = Annotated[str, option("NAME", _PRECISION, RUNNING, words=completion.KERNEL_PRECISIONS)]
BatchSize = Annotated[int, option("N", "Images per forward pass.", RUNNING, min=1)]
TimedBatch = Annotated[int, option("N", "Images per timed forward pass.", RUNNING, min=1)]
Workers = Annotated[
    int, option("N", "Processes that read images; 0: the main process reads them.", RUNNING, min=0, max=1000)
]
Quiet = Annotated[bool, flag("--quiet -q", "Print only errors and the names of written files.", TALK)]
Debug = Annotated[bool, flag("--debug", "Show tracebacks of errors.", TALK)]

# of convert

_KEEP = (
    "Fraction of keys that each query attends to (above 0, at most 1), or dense; calibration distributes the MACs over "
    "the heads. A list (0.2,dense,...) has one value per block."
)
Keep = Annotated[str | None, option("SHARE", _KEEP, KEPT, "the recipe's, 0.1; dense with --token-keep alone")]
_TOKEN_KEEP = "Fraction of patch tokens kept at each stage, or one rate per block (1,1,0.8,...)."
TokenKeep = Annotated[str | None, option("SHARE", _TOKEN_KEEP, KEPT, "all tokens")]
_STAGES = "Blocks that remove tokens after their attention, counted from 1."
TokenStages = Annotated[str | None, option("BLOCKS", _STAGES, KEPT, "by depth: 4,7,10 of 12")]
_WAY = "How tokens are removed: merge, evit or evit-fused."
TokenWay = Annotated[str | None, option("WAY", _WAY, KEPT, "merge", completion.WAYS)]
_IMPORTANCE = "Token importance: fitted (predicted from the token) or attention (cls row)."
TokenImportance = Annotated[str | None, option("KIND", _IMPORTANCE, KEPT, "fitted", completion.IMPORTANCES)]
_MACS = (
    "Search each block's keep and token count for this fraction of the dense model's MACs. Several (0.7,0.55,0.4) give "
    "one file with a schedule for each; the first is the default."
)
TargetMacs = Annotated[str | None, option("SHARE,...", _MACS, KEPT, "none")]
_LATENCY = "The same for a fraction of the dense model's time on this machine, at batch 1."
TargetLatency = Annotated[str | None, option("SHARE,...", _LATENCY, KEPT, "none")]
_FOR = (
    "Runtime to convert for: eager, compile, onnxruntime, openvino. The last two get fewer tokens and dense attention."
)
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
_RANK = "Rank of the predictor, or one per block; the MACs are distributed over the heads."
Rank = Annotated[str | None, option("R", _RANK, FORM, "the recipe's, 16")]
_TAIL = "What represents the dropped keys: none, mean, cells or clusters."
Tail = Annotated[str | None, option("NAME", _TAIL, FORM, "the recipe's, clusters", completion.TAILS)]
_CELLS = "Cells of the tail: rows x columns."
Cells = Annotated[str | None, option("RxC", _CELLS, FORM, "by tokens and keep: 4x3 at 197")]
_GRANULARITY = "Queries that share a key set: token (one query) or tile (4x4 neighbouring queries)."
Granularity = Annotated[str | None, option("NAME", _GRANULARITY, FORM, "token", completion.GRANULARITIES)]
_DATA = "Folder or timm data set of images for calibration and training."
TrainData = Annotated[str | None, option("DATA", _DATA, LEARNING, "built-in pictures, calibration only")]
_VAL = "Labelled images for validation, which selects the weights to write."
ValData = Annotated[str | None, option("DATA", _VAL, LEARNING, "held-back images of --data")]
CalibImages = Annotated[int | None, option("N", "Number of calibration images.", LEARNING, "the recipe's, 128", min=1)]
_NONFINITE = "Accept weights with NaN or infinity."
AllowNonfinite = Annotated[bool, flag("--allow-nonfinite", _NONFINITE, MODEL)]
CalibrateOnly = Annotated[bool, flag("--calibrate-only", "Calibrate in closed form, do not train.", LEARNING)]
Resume = Annotated[bool, flag("--resume", "Continue this output's interrupted fine-tuning.", LEARNING)]
SaveMinutes = Annotated[float, option("N", "Minutes between saved states of a fine-tuning.", LEARNING, min=0)]
_MICRO_BATCH = "Maximum images per forward/backward pass (gradient accumulation)."
MicroBatch = Annotated[int, option("N", _MICRO_BATCH, LEARNING, min=1)]
Seed = Annotated[
    int | None, option("N", "Random seed for the choice of images.", LEARNING, "the recipe's, 0", min=0, max=2**63 - 1)
]

# of sweep

_MEASURED = "Images to measure on: folder, timm data set or digits. Without class folders: agreement only."
SweepData = Annotated[str | None, option("DATA", _MEASURED, words=["digits"])]
_IMAGENET = "Instead of --data: ImageNet root with val/, or its val folder; labels are required."
SweepImageNet = Annotated[str | None, option("DIR", _IMAGENET)]
_CALIB = "Folder or data set of calibration images; labels are not used."
CalibData = Annotated[str | None, option("DATA", _CALIB, default="built-in pictures")]
Targets = Annotated[str, option("SHARES", "Fractions of the dense model's MACs to search schedules for, or none.")]
Keeps = Annotated[str, option("SHARES", "Fractions of keys for sparse attention over all tokens, or none.")]
_BUDGET = "Schedule to use, in a file with several: 0.55; 1: dense attention over all tokens."
Budget = Annotated[float | None, option("SHARE", _BUDGET, MODEL, "the file's first", min=0, max=1)]
_ADAPTIVE = "Mean cost per image, a fraction of dense: a cheap schedule, then a costlier one for unsure images."
Adaptive = Annotated[float | None, option("SHARE", _ADAPTIVE, MODEL, "one schedule", min=0, max=1)]
_PREFIX = "Writes PREFIX.md, .json, .png and the folder PREFIX.recipes."
SweepOutput = Annotated[Path, option("PREFIX", _PREFIX, names="--output -o")]
_LIMIT = "Number of images to measure on, drawn by --seed and spread over the classes."
Limit = Annotated[int | None, option("N", _LIMIT, default="all", min=1)]
LimitSeed = Annotated[int, option("N", "Random seed for the choice of images.", min=0, max=2**63 - 1)]
_NO_LABELS = "Ignore labels: measure agreement instead of accuracy."
NoLabels = Annotated[bool, flag("--no-labels", _NO_LABELS)]
SweepCalibImages = Annotated[int | None, option("N", "Number of calibration images.", default="128", min=1)]
SweepSeed = Annotated[
    int | None, option("N", "Random seed for the choice of images.", default="0", min=0, max=2**63 - 1)
]

# of show and report

_LAYERS, _DRAWN = "Layers to draw, counted from 1, or all.", "4 of those with sparse attention"
Layers = Annotated[str | None, option("N,N,...", _LAYERS, default=_DRAWN, names="--layer")]
_HEADS = "Heads to draw, counted from 1, or all."
Heads = Annotated[str | None, option("N,N,...", _HEADS, default="at most 6", names="--head")]
_QUERIES = (
    "Patch to draw the keys of: pixels of the image (120,80), or fractions of width and height (0.5,0.25). Repeatable."
)
_MIDDLE = "the middle, and one near the top left"
Queries = Annotated[list[str] | None, option("X,Y", _QUERIES, default=_MIDDLE, names="--query")]
