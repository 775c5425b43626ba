"""What a user says of a model's input and classes, where the model does not say it itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from torch import nn

from sparsify.errors import BadFile, UsageError, field, one_line
from sparsify.files.plain_json import from_json

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # timm's names
LARGEST_MAP = 2**24  # bytes
LARGEST = 1000  # mean and standard deviation; far beyond any of pixels from 0 to 1


@dataclass(frozen=True)
class Preprocessing:
    """timm's options of the same names; None: as the model's `pretrained_cfg` says."""

    mean: tuple[float, ...] | None = None  # subtracted from pixels, 0 to 1; one number, or one for each channel
    std: tuple[float, ...] | None = None  # divides them then
    crop_pct: float | None = None  # side of the central crop as a fraction of the resized image's shorter side
    interpolation: str | None = None  # of `INTERPOLATIONS`
    class_map: str | Path | None = None  # file of the names of all classes (`read_class_map`)

    def apply(self, model: nn.Module) -> None:
        """Writes what is given into the model's `pretrained_cfg`, a new one, from which everything else reads it.

        Raises:
            UsageError: a value that no preprocessing can have.
            BadFile: no such class map, or one of another number of classes than the model's.
        """
        host, given = cast(Any, model), {each.name: getattr(self, each.name) for each in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        channels = (host.pretrained_cfg.get("input_size") or (3,))[0]
        for name in ("mean", "std"):
            values = given.get(name, (0.5,))
            bound = 0 if name == "mean" else 1e-6
            if len(values) not in (1, channels) or not all(bound <= v <= LARGEST for v in values):
                raise UsageError(
                    f"{field(name)} {values[:4]}: one number, or one for each of {channels} channels, is expected"
                )
            if name in given:
                given[name] = tuple(values) * (channels if len(values) == 1 else 1)
        if not 0 < given.get("crop_pct", 1) <= 1:
            raise UsageError(f"{field('crop_pct')} {self.crop_pct}: a fraction above 0 and up to 1 is expected")
        if given.get("interpolation", "bicubic") not in INTERPOLATIONS:
            expected = f"one of {', '.join(INTERPOLATIONS)} is expected"
            raise UsageError(f"{field('interpolation')} {self.interpolation}: {expected}")
        if given.pop("class_map", None) is not None:
            names, classes = read_class_map(cast(Path, self.class_map)), getattr(model, "num_classes", 0)
            if len(names) != classes:
                raise BadFile(f"{self.class_map} names {len(names):,} classes, but the model has {classes:,}")
            given["label_names"] = names
        if given:
            host.pretrained_cfg = {**host.pretrained_cfg, **given}


def class_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's classes in their order, where it knows all of them; else none."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    known = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return tuple(names) if known and len(set(names)) == len(names) == getattr(model, "num_classes", 0) else ()


def read_class_map(path: str | Path) -> tuple[str, ...]:
    """The names of classes by their number: of a .txt one on each line, as in timm, of a .json a list or {name: number}.

    Raises:
        BadFile: missing, of another form, or a name or number twice or left out.
    """
    expected = "a .txt with the name of a class on each line, or a .json with a list or {name: number}, is expected"
    if not os.path.isfile(path):
        raise BadFile(f"no file {path}: {expected}")
    try:
        if os.path.getsize(path) > LARGEST_MAP:
            raise ValueError("too large")
        text = Path(path).read_text(encoding="utf-8-sig")
        is_json = Path(path).suffix.lower() == ".json"
        found = from_json(text) if is_json else [line.strip() for line in text.rstrip().splitlines()]
        if isinstance(found, dict):
            if sorted(found.values()) != list(range(len(found))):
                raise ValueError("the numbers are not 0, 1, 2, ...")
            found = sorted(found, key=found.__getitem__)
        if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
            raise ValueError("a class without a name")
        if not found or len(set(found)) != len(found):
            raise ValueError("a class twice" if found else "no classes")
        return tuple(found)
    except (OSError, ValueError, TypeError) as error:
        raise BadFile(f"{path} is no class map ({one_line(error, 100)}): {expected}") from None
