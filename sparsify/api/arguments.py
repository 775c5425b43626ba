"""What the functions of the library share: their arguments as the jobs below take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from sparsify import processes
from sparsify.errors import UsageError, as_arguments
from sparsify.jobs.dense import Preprocessing
from sparsify.keywords import PreprocessingOptions, Progress
from sparsify.models import hub
from sparsify.models.original import Which, opened
from sparsify.processes import Compute, Listener, Say

ModelOrFile = nn.Module | str | Path


def preprocessing(options: Any) -> Preprocessing | None:
    """The preprocessing that `options` give, taken from them; None where they give nothing of it."""
    given = {name: options.pop(name, None) for name in PreprocessingOptions.__optional_keys__}
    given |= {name: tuple(given[name]) for name in ("mean", "std") if given[name] is not None}
    return None if all(value is None for value in given.values()) else Preprocessing(**given)


def split(compute: Compute, options: Mapping[str, Any], known: Any) -> tuple[Compute, dict[str, Any]]:
    """`compute` with its fields that `options` give (None: as it is), and the other options; `known`: their TypedDict."""
    rest = dict(options)
    names = {field.name for field in fields(Compute)} & known.__optional_keys__ & rest.keys()
    given = {name: value for name in names if (value := rest.pop(name)) is not None}
    given |= {name: str(given[name]).removeprefix("torch.") for name in {"device", "dtype"} & given.keys()}
    return replace(compute, **given), rest


def opened_pair(
    model: ModelOrFile, dense: ModelOrFile | None, which: Which
) -> tuple[nn.Module, nn.Module | None, bool]:
    """The sparse model, the dense one that was given, and whether the backbone is known to have changed."""
    if not isinstance(model, nn.Module):
        file = opened(hub.local(model), dense, which=which)
        return file.model, file.dense, file.header.backbone_changed
    if which != Which():
        raise UsageError("budget and adaptive are of a file; a model has model.set_budget, and load takes adaptive")
    if dense is None or isinstance(dense, nn.Module):
        return model, dense, False
    raise UsageError(f"dense {dense}: beside a model that is no file, the dense model itself is expected")


def in_python(say: Say | None) -> Say:
    """`say`, told the fields that a line names as arguments."""
    return (lambda line: None) if say is None else lambda line: say(as_arguments(line))


@contextmanager
def listening(say: Say | None, progress: Progress = False) -> Iterator[Listener]:
    """Who hears of a job while the block runs: the caller's functions, or the bars that `progress` True asks for."""
    if progress is True and processes.main():
        from sparsify.progress import here

        with here() as reporter:
            yield Listener(in_python(say), reporter.update)
    elif isinstance(progress, bool):
        yield Listener(in_python(say))
    else:
        yield Listener(in_python(say), lambda step, done, total, *note: progress(step, done, total))
