"""Results that other commands wrote, read again for a report or a card: profile's and eval's JSON, and a sweep's.

A file that is missing, holds something else, or holds results of another model raises `BadFile`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn

from sparsify.errors import BadFile, one_line
from sparsify.files.plain_json import read_json
from sparsify.measure.figures import Profile, count_parameters
from sparsify.models.checkpoint import Header
from sparsify.models.original import Opened
from sparsify.reports.words import mapping


class SweepFiles(NamedTuple):
    """A sweep's figures and its plot."""

    figures: Mapping[str, Any]  # `sparsify.reports.sweep.as_dict`
    picture: bytes | None  # None: there is none beside them


def profile(path: Path) -> Profile:
    """What `sparsify profile --json` wrote."""
    tree = read_json(path)
    try:
        return Profile.from_dict(tree)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadFile(f"{path} is not a profile: 'sparsify profile FILE --json {path.name}' writes one") from None


def times(path: Path, macs: int, params: int) -> Profile:
    """What `sparsify profile --json` measured of a model with as many MACs and parameters."""
    figures = profile(path)
    if figures.measured is None:
        raise BadFile(f"{path} has no measured times: 'sparsify profile FILE --json NAME.json' writes them")
    if (figures.macs_sparse, figures.param_count) != (macs, params):
        raise BadFile(f"{path} has the times of another model: profile this one")
    return figures


def evaluation(path: Path) -> Mapping[str, Any]:
    """What `sparsify eval --results-file` wrote as JSON."""
    tree = read_json(path)
    numbers = ("top1", "agreement", "cosine_pooled", "knn_top1", "correlation")
    figures = [tree.get(name) for name in (*numbers, "images", "kl", "dense_top1", "param_count")]
    right = any(name in tree for name in numbers) and isinstance(tree.get("images"), int)
    if not right or not all(each is None or _is_number(each) for each in figures):
        raise BadFile(f"{path} holds no results of eval: 'sparsify eval --results-file {path.stem}.json' writes them")
    return tree


def results(path: Path, digest: str, header: Header) -> Mapping[str, Any]:
    """What `sparsify eval --results-file` wrote as JSON, with its conditions, of the file with this digest and header."""
    tree = read_json(path)
    if not isinstance(tree.get("conditions"), dict) or not tree.get("images"):
        how = "'sparsify eval FILE --results-file NAME.json' writes them"
        raise BadFile(f"{path} has no results with their conditions: {how}")
    if tree["conditions"].get("file_sha256") != digest:
        raise BadFile(f"{path} has the results of another file: evaluate this one")
    _check_schedule(path, tree, header)
    return tree


def sweep(path: Path) -> SweepFiles:
    """A sweep's PREFIX.json, or the folder that contains exactly one, and the picture beside it."""
    file = _sweep_in(path) if path.is_dir() else path
    tree = read_json(file)
    if not _is_sweep(tree):
        raise BadFile(f"{file} is not a sweep: 'sparsify sweep NAME' writes PREFIX.json")
    picture = file.with_suffix(".png")
    try:
        return SweepFiles(tree, picture.read_bytes() if picture.is_file() else None)
    except OSError as error:
        raise BadFile(f"{picture} cannot be read: {one_line(error)}") from None


def check_profile(path: Path, figures: Profile, file: Path, header: Header, model: nn.Module) -> None:
    """Raise `BadFile` if parameters or MACs show that the profile at `path` is of another model than that of `file`."""
    counted = header.report.get("macs_sparse", figures.macs_sparse)
    own_size = list(figures.conditions["img_size"]) == list(cast(Any, model).patch_embed.img_size)
    if figures.param_count != count_parameters(model) or (own_size and figures.macs_sparse != counted):
        raise BadFile(f"{path} is the profile of another model than {file}: profile this one")


def check_evaluation(path: Path, figures: Mapping[str, Any], file: Path, one: Opened) -> None:
    """Raise `BadFile` if the results at `path` are of another file than `file`, or of another of its schedules."""
    digest, model = one.digest, one.model
    _check_schedule(path, figures, one.header)
    if mapping(figures.get("conditions")).get("file_sha256") not in (None, digest):
        raise BadFile(f"{path} has the results of another file than {file}: evaluate this one")
    stated, count = figures.get("param_count"), count_parameters(model) / 1e6  # millions, as timm has it
    if stated is not None and abs(stated - round(count, 2)) > 0.006:
        found = f"{path} has results of a model with {stated:g} M parameters"
        raise BadFile(f"{found}, {file} has {count:.2f} M: evaluate this one")


def _check_schedule(path: Path, figures: Mapping[str, Any], header: Header) -> None:
    """Raise `BadFile` where results are of another schedule than the one in use, as far as they say."""
    if figures.get("ran_twice") is not None:
        raise BadFile(f"{path} has results of adaptive inference, not of one schedule")
    budget = mapping(figures.get("conditions")).get("budget")
    if budget not in (None, header.budget):
        own = "none" if header.budget is None else f"{header.budget:g}"
        raise BadFile(f"{path} has results of budget {budget}, this is about budget {own}: evaluate that")


def _sweep_in(folder: Path) -> Path:
    sweeps = [file for file in sorted(folder.glob("*.json")) if _is_sweep(_readable(file))]
    if len(sweeps) != 1:
        names = ", ".join(file.name for file in sweeps[:3]) or "none"
        raise BadFile(f"{folder} holds {len(sweeps)} sweeps ({names}): give the JSON file of one")
    return sweeps[0]


def _readable(path: Path) -> Mapping[str, Any]:
    try:
        return read_json(path)
    except BadFile:
        return {}


def _is_sweep(tree: Mapping[str, Any]) -> bool:
    settings: Any = tree.get("settings")
    if not isinstance(settings, list) or not settings or not isinstance(tree.get("dense"), Mapping):
        return False
    return all(_is_number(mapping(s).get("macs_share")) and _is_number(mapping(s).get("speed")) for s in settings)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
