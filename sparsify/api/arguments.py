"""What the functions of the library share: their arguments as the jobs below take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsify import processes
from sparsify.errors import UsageError, as_arguments, field
from sparsify.images.given import GivenImages
from sparsify.jobs.dense import DenseRequest, Preprocessing
from sparsify.keywords import PreprocessingOptions, Progress
from sparsify.models import hub
from sparsify.models.original import Which, opened
from sparsify.nn import cuda_graphs
from sparsify.processes import Compute, Listener, Say

ModelOrFile = nn.Module | str | Path
Images = str | Path | Tensor | Iterable[Any]
"""A folder or data set; or tensors [B, 3, H, W] that are normalised already, or an iterable of such tensors."""

OF_A_NAME = ("num_classes", "img_size", "ema")


def given_images(images: Images | None, option: str = "data") -> str | GivenImages | None:
    """Images as a job takes them; `option`: the argument that they were given by."""
    return images if images is None else str(images) if isinstance(images, str | Path) else GivenImages(images, option)


def dense_request(model: Any, weights: str | Path | None, options: Any) -> DenseRequest:
    """What is to be converted; takes what describes it from `options`."""
    described, nonfinite = preprocessing(options), options.pop("allow_nonfinite", False)
    num_classes, img_size, ema = (options.pop(name, None) for name in OF_A_NAME)
    if isinstance(model, nn.Module):
        given = dict(zip(("weights", *OF_A_NAME), (weights, num_classes, img_size, ema), strict=True))
        for name, value in given.items():
            if value is not None:
                has = "a module has its own weights, classes and image size"
                raise UsageError(f"{field(name)} is of a name: {has}; change the module before")
        return DenseRequest(preprocessing=described, allow_nonfinite=nonfinite, module=model)
    if not isinstance(model, str | Path):
        raise UsageError(f"model {type(model).__name__}: the name of a model or a module (nn.Module) is expected")
    file = None if weights is None else Path(weights)
    return DenseRequest(str(model), file, num_classes, img_size, ema, described, nonfinite)


def device_of(request: DenseRequest) -> str:
    """Where a job computes if nothing else is asked for: where the caller's module lies, or the CPU."""
    first = None if request.module is None else next(request.module.parameters(), None)
    return "cpu" if first is None else str(first.device)


def preprocessing(options: Any) -> Preprocessing | None:
    """The preprocessing that `options` give, taken from them; None where they give nothing of it."""
    given = {name: options.pop(name, None) for name in PreprocessingOptions.__optional_keys__}
    given |= {name: tuple(given[name]) for name in ("mean", "std") if given[name] is not None}
    return None if all(value is None for value in given.values()) else Preprocessing(**given)


def split(compute: Compute, options: Mapping[str, Any], known: Any) -> tuple[Compute, dict[str, Any]]:
    """`compute` with its fields that `options` give (None: as it is), and the other options; `known`: their TypedDict."""
    rest = dict(options)
    names = {each.name for each in fields(Compute)} & known.__optional_keys__ & rest.keys()
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
        return cuda_graphs.plain(model), dense, False
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
