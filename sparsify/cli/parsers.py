"""Plain text of options -> values; whatever cannot be understood is a `UsageError` that names the option."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sparsify.cli import completion
from sparsify.cli.preflight import preflight
from sparsify.errors import UsageError
from sparsify.processes import DTYPES, Compute

if TYPE_CHECKING:
    from pathlib import Path

    from sparsify.config import Target, Tokens
    from sparsify.images.preprocessing import Preprocessing

T = TypeVar("T")


def listed(text: str, name: str, parse: Callable[[str], T], expected: str) -> tuple[T, ...]:
    """The values between commas: '0.2,0.1' -> (0.2, 0.1); a `UsageError` where `parse` raises ValueError."""
    try:
        return tuple(parse(part.strip()) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{name} {text}: {expected} expected") from None


def by_block(text: str | None, name: str, parse: Callable[[str], T], what: str) -> T | tuple[T, ...] | None:
    """One value, or one for each block: '0.1' -> 0.1; '0.2,0.1' -> (0.2, 0.1); `what` names a value in the error."""
    if text is None:
        return None
    values = listed(text, name, parse, f"{what}, or one for each block separated by commas, is")
    return values if "," in text else values[0]


def keeps(text: str | None) -> float | str | tuple[float | str, ...] | None:
    """--keep: '0.1' -> 0.1; '0.2,dense' -> (0.2, 'dense')."""
    return by_block(text, "--keep", lambda part: part if part == "dense" else float(part), "a number or 'dense'")


def whole_numbers(text: str | None, name: str) -> int | tuple[int, ...] | None:
    """'16' -> 16; '24,16' -> (24, 16)."""
    return by_block(text, name, int, "a whole number")


def runtimes(text: str | None) -> tuple[str, ...]:
    """--against: 'eager,openvino' -> ('eager', 'openvino'); nothing where it is not given."""
    names = () if text is None else listed(text, "--against", str, "names")
    for name in names:
        one_of("--against", name, completion.AGAINST)
    return names


def shares(text: str, name: str) -> tuple[float, ...]:
    """Numbers above 0 and up to 1: '0.8,0.7' -> (0.8, 0.7), each once; 'none' -> ()."""

    def share(part: str) -> float:
        value = float(part)
        if not 0 < value <= 1:
            raise ValueError
        return value

    if text.strip() == "none":
        return ()
    expected = "numbers above 0 and up to 1 separated by commas, or 'none', are"
    return tuple(dict.fromkeys(listed(text, name, share, expected)))


def tokens(
    keep: str | None, stages: str | None, way: str | None, importance: str | None, recipe: Tokens | None
) -> dict[str, Any] | None:
    """The fields of `Tokens` that the options --token-* give, over a recipe's; None where no option is given."""
    given: dict[str, Any] = {
        "keep": by_block(keep, "--token-keep", float, "a number"),
        "stages": None if stages is None else _tuple(whole_numbers(stages, "--token-stages")),
        "way": way,
        "importance": importance,
    }
    given = {key: value for key, value in given.items() if value is not None}
    return (recipe.model_dump() if recipe else {}) | given if given else None


def target(
    macs: str | None, latency: str | None, keep: str | None, token_keep: str | None, runtime: str = "eager"
) -> Target | None:
    """What schedules are chosen for, with the keeps that --keep leaves to choose from; None where no target is given.

    Raises:
        UsageError: both targets, one that is out of range, or rates that the search is to choose.
    """
    from sparsify import config

    if token_keep is not None and (macs is not None or latency is not None):
        raise UsageError("--token-keep and a target: the search chooses the tokens; leave one of them out")
    chosen = None if keep is None else [None if value == "dense" else value for value in _tuple(keeps(keep))]
    expected = "numbers above 0 and up to 1 separated by commas are"
    fractions = None if macs is None else listed(macs, "--target-macs", float, expected)
    times = None if latency is None else listed(latency, "--target-latency", float, expected)
    return config.target(fractions, times, chosen, runtime)


def rectangle(text: str | None, name: str) -> tuple[int, int] | None:
    """'4x3' -> (4, 3); '4' -> (4, 4)."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdecimal() and len(side) < 10 for side in sides):
        raise UsageError(f"{name} {text}: ROWSxCOLUMNS such as 4x3 is expected")
    return int(sides[0]), int(sides[-1])


def use_labels(imagenet: str | None, data: str | None, no_labels: bool) -> bool | None:
    """Whether images are used with their labels (None: where there are any), from which of the options was given."""
    if (imagenet is None) == (data is None):
        raise UsageError("give the images to measure on: either --imagenet PATH or --data NAME")
    if imagenet is not None and no_labels:
        raise UsageError("--imagenet requires labels: with --no-labels give the images by --data")
    return True if imagenet is not None else False if no_labels else None


def compute(device: str, dtype: str, backend: str, kernel_precision: str = "input", **sizes: int) -> Compute:
    """How a job computes, by the options of the group Running (`sizes`: batch_size, micro_batch, workers).

    From here on torch and timm are there.

    Raises:
        UsageError: an unknown name, or a device that is unknown or absent.
        SparsifyError: torch or timm cannot be imported, see `preflight`.
    """
    one_of("--backend", backend, completion.BACKENDS)
    one_of("--kernel-precision", kernel_precision, completion.KERNEL_PRECISIONS)
    one_of("--dtype", dtype, DTYPES)
    preflight()
    made = Compute(device, dtype, backend, kernel_precision, **sizes)
    _ = made.torch_device  # refuses one that is not there
    return made


def preprocessing(
    mean: str | None, std: str | None, crop_pct: float | None, interpolation: str | None, class_map: Path | None
) -> Preprocessing:
    """What is given of a model's preprocessing; whoever applies it checks the values. Call it after `compute`."""
    from sparsify.images.preprocessing import Preprocessing

    expected = "numbers separated by commas are"
    means = None if mean is None else listed(mean, "--mean", float, expected)
    stds = None if std is None else listed(std, "--std", float, expected)
    return Preprocessing(means, stds, crop_pct, interpolation, class_map)


def one_of(option: str, name: str, known: Sequence[str]) -> None:
    """Raise `UsageError` unless `name` is known."""
    if name not in known:
        raise UsageError(f"{option} {name}: expected one of {', '.join(known)}")


def _tuple(value: T | tuple[T, ...] | None) -> tuple[T | None, ...]:
    return value if isinstance(value, tuple) else (value,)
