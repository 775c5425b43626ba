"""Options that several commands share, each with its unit and default, and their plain-text parsers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsify.cli import completion
from sparsify.cli.helptext import MODEL, RUNNING, TALK
from sparsify.errors import as_options

if TYPE_CHECKING:
    pass

MODEL_FILE = Path("model.safetensors")


def model_file(name: str | Path) -> Path:
    """The file of a FILE argument; a hub's name is downloaded.

    Raises:
        SparsifyError: see `sparsify.models.hub.local`.
    """
    from sparsify.models import hub

    return hub.local(name if str(name).startswith((*hub.SCHEMES, "local-dir:")) else Path(name))


Model = Annotated[
    Path, typer.Argument(metavar="FILE", parser=model_file, help="File that 'convert' wrote, or hf-hub:ORG/NAME.")
]
Dense = Annotated[
    str | None,
    typer.Option(
        "--dense",
        metavar="NAME|FILE",
        help="Dense original to compare with: name, or checkpoint. Needed for fine-tuned files only.",
        show_default="the file's own weights",
        autocompletion=completion.models,
        rich_help_panel=MODEL,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Your own checkpoint of that architecture, .safetensors or .pth.",
        show_default="timm's",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Device of torch: cpu, cuda, cuda:1, mps.",
        autocompletion=completion.one_of(completion.DEVICES),
        rich_help_panel=RUNNING,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16 or float16.",
        autocompletion=completion.one_of(completion.DTYPES),
        rich_help_panel=RUNNING,
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Implementation of sparse attention: auto (the CPU kernels if they can run), cpu, reference.",
        autocompletion=completion.one_of(completion.BACKENDS),
        rich_help_panel=RUNNING,
    ),
]
KernelPrecision = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What the CPU kernels store: input (the model's dtype), or bf16 for float32 models too.",
        autocompletion=completion.one_of(completion.KERNEL_PRECISIONS),
        rich_help_panel=RUNNING,
    ),
]
Workers = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="Processes that read images; 0 reads in this one.", rich_help_panel=RUNNING),
]
ImgSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="PIXELS",
        help="Side of the image in pixels.",
        show_default="the model's own",
        rich_help_panel=MODEL,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print nothing but the names of the files written, and errors.", rich_help_panel=TALK
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=TALK)]


def say(quiet: bool) -> Callable[[str], None]:
    """What takes notes for the person at the terminal: prints them on stderr at once, or drops them where `quiet`."""
    return (lambda line: None) if quiet else (lambda line: print(as_options(line), file=sys.stderr, flush=True))
