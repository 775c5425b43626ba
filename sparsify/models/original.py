"""A converted file with the dense model that it was made from, which a fine-tuned file's own weights no longer are."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from sparsify.errors import BadFile, UsageError, field
from sparsify.models import building, checkpoint, names, pretrained
from sparsify.models.checkpoint import Header
from sparsify.models.dense_weights import read_checkpoint
from sparsify.models.hub import CHECKPOINTS
from sparsify.nn.adaptive import Rule, adaptive, lead
from sparsify.processes import Say


@dataclass(frozen=True)
class Opened:
    """A converted file with the dense original that it is compared with: both float32, eval mode, on the CPU at first."""

    model: nn.Module  # the sparse model; of a mean cost the adaptive one
    # the original that was asked for; None: the model's own weights without sparsity, unless `header.backbone_changed`
    dense: nn.Module | None
    header: Header
    digest: str  # of the file's content
    rule: Rule | None = None  # of the adaptive model

    @property
    def lead(self) -> nn.Module:
        """The model that has the preprocessing and the classes: of an adaptive one its first."""
        return lead(self.model)

    @property
    def note(self) -> str:
        """One line for people where there are no dense figures: why, and what gives them; else ''."""
        return missing(self.header) if self.header.backbone_changed and self.dense is None else ""

    def on(self, device: torch.device) -> Opened:
        """The same with its models on a device."""
        dense = self.dense if self.dense is None else self.dense.to(device)
        return replace(self, model=self.model.to(device), dense=dense)


class Which(NamedTuple):
    """Which form of a file's model; at most one is given, and none stands for the schedule that the file has in use."""

    budget: float | None = None  # see `sparsify.models.checkpoint.read`
    adaptive: float | None = None  # mean cost of the adaptive form (`sparsify.nn.adaptive`), a fraction of dense


def opened(
    file: Path,
    dense: nn.Module | str | Path | None = None,
    img_size: int | None = None,
    say: Say = lambda line: None,
    which: Which = Which(),
) -> Opened:
    """Reads a file that `convert` wrote, and its dense original where one is asked for.

    Args:
        dense: a model, which is taken as it is; a name or checkpoint (`load_original`), held against the file; or None.
        img_size: side in pixels, of both models; None: the file's own.
        say: called with a line now and then, as where the file has other budgets.

    Raises:
        SparsifyError: see `sparsify.models.checkpoint.read`, `Header.rule` and `load_original`.
    """
    budget, cost = which
    if budget is not None and cost is not None:
        raise UsageError(f"give either {field('budget')}, one schedule, or {field('adaptive')}, two of them")
    one = checkpoint.read(file, img_size, budget=budget)
    rule = None if cost is None else one.header.rule(cost)
    model = one.model if rule is None else adaptive(one.model, rule)
    if rule is not None:
        say(rule.words())
    elif budget is None and len(one.header.schedules) > 1:
        say(f"budget {one.header.budget:g}; {field('budget')} takes {others(one.header)}")
    if dense is not None and not isinstance(dense, nn.Module):
        dense = load_original(one.header, dense, img_size, say)
    return Opened(model, dense, one.header, one.digest, rule)


def load_original(
    header: Header, asked: str | Path, img_size: int | None = None, say: Say = lambda line: None
) -> nn.Module:
    """The dense model `asked` on the CPU, float32, eval mode, if it is the one that the file of `header` was made from.

    Args:
        asked: a name (`names.resolve`), or a checkpoint (.safetensors, .pth) of the file's architecture.
        img_size: side in pixels, when it is not the file's; position embeddings are resampled after the comparison.
        say: called with a line where the file is too old to tell which model it was made from.

    Raises:
        BadFile: another model, or a file that cannot be read, is no checkpoint or was written by `convert`.
        UsageError: an unknown name, or an image size that the architecture cannot take.
        SparsifyError: weights that cannot be downloaded.
    """
    asked = str(asked)
    file = Path(asked)
    is_file = file.suffix in CHECKPOINTS or os.path.isfile(file)
    model = _from_file(header, file) if is_file else _from_name(header, asked)
    if not header.dense_sha256:
        say(f"{field('dense')} {asked} has the right architecture; the file does not record whether it is the original")
    elif checkpoint.digest_of(model) != header.dense_sha256:
        raise _not_the_original(header, asked, "its weights differ")
    if img_size is not None:
        checkpoint.resize(model, img_size)
    return model


def others(header: Header) -> str:
    """The budgets of a file that are not in use, in words."""
    return ", ".join(f"{b:g}" for b in sorted({1.0, *header.schedules} - {header.budget}, reverse=True))


def missing(header: Header) -> str:
    """One line: why a file whose backbone changed has no dense figures, and what to give for them."""
    known = header.provenance.get("backbone_changed") is True
    why = "this file's weights were fine-tuned" if known else "this file does not say that its weights are unchanged"
    return f"no dense figures: {why}; {_hint(header)} compares with the original"


def _from_name(header: Header, asked: str) -> nn.Module:
    source = names.resolve(asked)
    architecture, num_classes, side = _built(header)
    if source.architecture != architecture:
        raise _not_the_original(header, asked, f"it is a {source.architecture}, the file a {architecture}")
    classes = int(cast(Any, building.skeleton(source)).num_classes)
    if num_classes not in (None, 0, classes):
        raise _not_the_original(header, asked, f"it has {classes} classes, the file {num_classes}")
    return pretrained.load(source, None, num_classes, side)


def _from_file(header: Header, file: Path) -> nn.Module:
    if os.path.isfile(file) and _converted(file):
        wrong = f"{field('dense')} {file}: a model that 'sparsify convert' wrote, not a dense one"
        raise BadFile(f"{wrong}; give {_hint(header)}")
    architecture, num_classes, side = _built(header)
    args = names.tuples(header.architecture["model_args"])
    kind = header.provenance.get("transformers")  # of the checkpoint, in whose form the file is
    foreign = names.Foreign(kind) if isinstance(kind, str) else None
    source = names.Source(architecture, architecture, architecture, args, foreign=foreign)
    ema = False if header.provenance.get("ema") is False else None
    return pretrained.load(source, read_checkpoint(file, ema), num_classes, side)


def _built(header: Header) -> tuple[str, int | None, int | None]:
    """Architecture, number of classes, and side in pixels of a square image; None: what the weights have."""
    args = header.architecture["model_args"]
    size = args.get("img_size")
    sides = set(size) if isinstance(size, list | tuple) else {size}
    return header.architecture["architecture"], args.get("num_classes"), sides.pop() if len(sides) == 1 else None


def _converted(file: Path) -> bool:
    try:
        checkpoint.read_header(file)
    except BadFile:
        return False
    return True


def _not_the_original(header: Header, asked: str, why: str) -> BadFile:
    dense = f"{field('dense')} {asked}"
    return BadFile(f"{dense} is not the model that this file was made from ({why}); give {_hint(header)}")


def _hint(header: Header) -> str:
    """The argument that names the original, as far as the file tells."""
    source, weights = header.provenance.get("source"), header.provenance.get("weights")
    if weights:
        return f"{field('dense')} FILE with {weights}, the checkpoint that was converted,"
    return f"{field('dense')} {source or 'NAME|FILE'}"
