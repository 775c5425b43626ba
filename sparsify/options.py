"""Options that several commands share, each with its unit and default, and their plain-text parsers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sparsify.errors import UsageError

MODEL_FILE = Path("model.safetensors")

Model = Annotated[Path, typer.Argument(metavar="FILE", help="File that 'convert' wrote.")]
Device = Annotated[str, typer.Option(help="Device of torch: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Backend = Annotated[
    str,
    typer.Option(help="Implementation of sparse attention: auto (the CPU kernels if they can run), cpu, reference."),
]
KernelPrecision = Annotated[
    str, typer.Option(help="What the CPU kernels store: input (the model's dtype), or bf16 for float32 models too.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images; 0 reads in this one.")]
ImgSize = Annotated[
    int | None, typer.Option(min=1, help="Side of the image in pixels.", show_default="the model's own")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but results' files and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def numbers(text: str | None, name: str) -> float | tuple[float, ...] | None:
    """'0.1' -> 0.1; '0.2,0.1' -> (0.2, 0.1).

    Raises:
        UsageError: not numbers.
    """
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{name} {text}: a number, or one for each block separated by commas, is expected") from None
    return values if "," in text else values[0]


def whole_numbers(text: str | None, name: str) -> int | tuple[int, ...] | None:
    """'16' -> 16; '24,16' -> (24, 16).

    Raises:
        UsageError: not whole numbers.
    """
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{name} {text}: a whole number, or one for each block separated by commas, is expected"
        ) from None
    return values if "," in text else values[0]


def rectangle(text: str | None, name: str) -> tuple[int, int] | None:
    """'4x3' -> (4, 3); '4' -> (4, 4).

    Raises:
        UsageError: not of that form.
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdecimal() for side in sides):
        raise UsageError(f"{name} {text}: ROWSxCOLUMNS such as 4x3 is expected")
    return int(sides[0]), int(sides[-1])


def torch_dtype(name: str):  # type: ignore[no-untyped-def]
    """torch.dtype of a name.

    Raises:
        UsageError: another name.
    """
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise UsageError(f"--dtype {name}: expected one of {', '.join(names)}")
    return names[name]


def torch_device(name: str) -> str:
    """`name` if torch can compute there.

    Raises:
        UsageError: unknown or absent device.
    """
    import torch

    try:
        torch.zeros(1, device=name)
    except Exception as error:
        raise UsageError(f"--device {name}: {' '.join(str(error).split())[:120]}; try --device cpu") from None
    return name


def backend(name: str) -> str:
    """`name` if it is a backend; whether it can be used here is the job's question.

    Raises:
        UsageError: another name.
    """
    from sparsify.ops import BACKENDS

    return _one_of("--backend", name, BACKENDS)


def kernel_precision(name: str) -> str:
    """`name` if it is a precision of the kernels.

    Raises:
        UsageError: another name.
    """
    from sparsify.ops import PRECISIONS

    return _one_of("--kernel-precision", name, PRECISIONS)


def _one_of(option: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise UsageError(f"{option} {name}: expected one of {', '.join(known)}")
    return name
