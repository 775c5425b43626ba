"""Plain-text parsers of options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsify.errors import UsageError

if TYPE_CHECKING:
    from sparsify.config import Target, Tokens


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


def keeps(text: str | None, name: str) -> float | str | tuple[float | str, ...] | None:
    """'0.1' -> 0.1; '0.2,dense' -> (0.2, 'dense').

    Raises:
        UsageError: neither numbers nor `dense`.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    try:
        values = tuple(part if part == "dense" else float(part) for part in parts)
    except ValueError:
        raise UsageError(
            f"{name} {text}: a number or 'dense', or one for each block separated by commas, is expected"
        ) from None
    return values if "," in text else values[0]


def shares(text: str, name: str) -> tuple[float, ...]:
    """'0.8,0.7' -> (0.8, 0.7), each once; 'none' -> ().

    Raises:
        UsageError: not numbers above 0 and up to 1.
    """
    if text.strip() == "none":
        return ()
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (0.0,)
    if not all(0 < value <= 1 for value in values):
        raise UsageError(f"{name} {text}: numbers above 0 and up to 1 separated by commas, or 'none', are expected")
    return tuple(dict.fromkeys(values))


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


def tokens(
    keep: str | None, stages: str | None, way: str | None, importance: str | None, recipe: Tokens | None
) -> dict[str, Any] | None:
    """What the options --token-* say, on top of a recipe's; None where nothing does."""
    if keep is None and stages is None and way is None and importance is None:
        return None
    given = {
        "keep": numbers(keep, "--token-keep"),
        "stages": None if stages is None else tuple(_list(whole_numbers(stages, "--token-stages"))),
        "way": way,
        "importance": importance,
    }
    return (recipe.model_dump() if recipe else {}) | {key: value for key, value in given.items() if value is not None}


def target(macs: float | None, latency: float | None, keep: str | None, token_keep: str | None) -> Target | None:
    """What a schedule is to be chosen for, with the keeps that --keep leaves to choose from.

    Raises:
        UsageError: both targets, one that is out of range, or rates that the search is to choose.
    """
    from sparsify.config import Target, validate

    if macs is None and latency is None:
        return None
    if macs is not None and latency is not None:
        raise UsageError("give either --target-macs or --target-latency")
    if token_keep is not None:
        raise UsageError("--token-keep and a target: the search chooses the tokens; leave one of them out")
    tree: dict[str, Any] = {"macs": macs, "latency": latency}
    if keep is not None:
        tree["keeps"] = [None if value == "dense" else value for value in _list(keeps(keep, "--keep"))]
    return validate(Target, tree, "option target")


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


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
    from sparsify.ops.backends import BACKENDS

    return _one_of("--backend", name, BACKENDS)


def kernel_precision(name: str) -> str:
    """`name` if it is a precision of the kernels.

    Raises:
        UsageError: another name.
    """
    from sparsify.ops.backends import PRECISIONS

    return _one_of("--kernel-precision", name, PRECISIONS)


def _one_of(option: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise UsageError(f"{option} {name}: expected one of {', '.join(known)}")
    return name
