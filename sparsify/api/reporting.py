"""A file to pictures, to a page, and to a repository of the hub."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from sparsify import processes
from sparsify.api.arguments import ModelOrFile, in_python, listening
from sparsify.errors import UsageError
from sparsify.files.destinations import check_folder
from sparsify.images import photograph
from sparsify.jobs import push as push_job
from sparsify.jobs import report as report_job
from sparsify.jobs import show as show_job
from sparsify.jobs.push import Pushed
from sparsify.jobs.report import Page, Results
from sparsify.jobs.show import Pictures, Views
from sparsify.keywords import PushOptions, ViewOptions
from sparsify.models import hub
from sparsify.models.original import Which, opened
from sparsify.nn import cuda_graphs
from sparsify.nn.adaptive import Adaptive
from sparsify.processes import Compute

PathOrPaths = str | Path | Sequence[str | Path]


def show(
    model: ModelOrFile,
    images: PathOrPaths,
    output: str | Path | None = None,
    *,
    dense: ModelOrFile | None = None,
    img_size: int | None = None,
    budget: float | None = None,
    device: str | torch.device = "cpu",
    **options: Unpack[ViewOptions],
) -> Pictures:
    """Draw the keys that patches attend to, the tokens that go on, and how much attention is kept.

    Example:
        pictures = sparsify.show("model.safetensors", "cat.jpg", queries=[(0.5, 0.5)])
        IPython.display.Image(pictures.files["cat.keys-1.png"])

    Args:
        model: file, or a sparse model (a copy of it is looked at, in float32).
        images: image file, or several.
        output: folder for the PNGs; None: nothing is written, and `Pictures.files` has them.
        dense: the dense original, whose attention is the true one then: a model; with a file also a name or a checkpoint.
            None: the sparse model's own.
        img_size: of a file: side in pixels; None: the file's.
        budget: of a file, which schedule; None: the file's first.
        device: of torch: cpu, cuda, cuda:1, mps.

    Keyword Args:
        queries: patches whose keys are drawn, (x, y): whole pixels of the image, or floats, fractions of its sides. None
            given: the middle, and near the top left corner.
        layers: to draw keys of, counted from 1, or 'all'; None: 4 of those with sparse attention.
        heads: counted from 1, or 'all'; None: at most 6.
        say: called with a line now and then.
        progress: as in `convert`.

    Returns:
        What the model does with each image, the PNGs by file name, and the paths that were written.

    Raises:
        SparsifyError: a file, image, layer, head or point that cannot be used, or a folder that cannot be written.
    """
    views, say, progress = _views(images, options)
    target = processes.torch_device(device)
    with listening(say, progress) as listener:
        if not isinstance(model, nn.Module):
            one = opened(hub.local(model), dense, img_size, listener.say, Which(budget))
            sparse, original = one.on(target).model, one.on(target).dense
        elif img_size is not None or budget is not None or not (dense is None or isinstance(dense, nn.Module)):
            raise UsageError("img_size, budget and the name of a dense model are of a file; this is a model")
        elif isinstance(model, Adaptive):
            raise UsageError("an adaptive model is two schedules of a file: show one of them, model.first")
        else:
            sparse, original = _plain(model, target), None if dense is None else _plain(dense, target)
        return show_job.show(sparse, views, None if output is None else Path(output), original, listener)


def report(
    file: str | Path,
    output: str | Path = "report.html",
    *,
    images: PathOrPaths = (),
    results: Mapping[str, str | Path] | None = None,
    measure: bool = False,
    dense: str | Path | None = None,
    budget: float | None = None,
    device: str | torch.device = "cpu",
    **options: Unpack[ViewOptions],
) -> Page:
    """Write one HTML page about a file: settings, MACs, time, accuracy, a sweep and pictures. It needs no network.

    Args:
        file: that `convert` wrote, or the name of a repository on the hub.
        output: page to write.
        images: image files to draw what the model does with.
        results: what earlier commands wrote about this file, by kind: {"profile": FILE.json, "eval": FILE.json, "sweep":
            FILE.json or its folder}. Without a profile MACs are counted now.
        measure: measure the latency now, on this machine.
        dense: the dense original, name or checkpoint; None: the file's own weights without sparsity.
        budget: of the file, which schedule; None: the file's first.
        device: of torch: cpu, cuda, cuda:1, mps.

    Keyword Args:
        queries: as in `show`.
        layers: as in `show`.
        heads: as in `show`.
        say: called with a line now and then.
        progress: as in `convert`.

    Returns:
        The path of the page, its size in characters, and what is on it.

    Raises:
        SparsifyError: a file, image or result that cannot be read or is another model's, or a page that cannot be written.
    """
    views, say, progress = _views(images, options)
    found = {kind: Path(path) for kind, path in (results or {}).items()}
    known = Results(found.pop("profile", None), found.pop("eval", None), found.pop("sweep", None), measure)
    if found:
        raise UsageError(f"results {min(found)}: expected are profile, eval and sweep")
    with listening(say, progress) as listener:
        how: dict[str, Any] = {"dense": dense, "budget": budget, "compute": Compute(str(device)), "listener": listener}
        return report_job.report(hub.local(file), Path(output), known, views, **how)


def push(
    file: str | Path,
    repo: str,
    *,
    evaluation: str | Path | None = None,
    profile: str | Path | None = None,
    output: str | Path | None = None,
    dry_run: bool = False,
    **options: Unpack[PushOptions],
) -> Pushed:
    """Put a converted file on the hub, with its model card, in one commit.

    The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` stored.

    Args:
        file: that `convert` wrote.
        repo: ORG/NAME of the repository; made where there is none.
        evaluation: results for the card, of `sparsify eval --results-file NAME.json`.
        profile: times for the card, of `sparsify profile --json`.
        output: folder to write the files to; nothing is sent then.
        dry_run: neither send nor write anything; `Pushed.package.card` is the card.

    Keyword Args:
        private: a new repository is private.
        revision: branch; made where there is none. None: main.
        message: of the commit; None: names sparsify's version.
        licence: of the weights, if you know it better than the file.
        force: replace another model.
        say: called with a line now and then.

    Returns:
        URL and commit ('' where nothing was sent), the name that `load` takes, and what was sent or written.

    Raises:
        SparsifyError: a file that is no converted model, results of another file, no token, no network, no right to write,
            or another model there. Nothing was sent then.
    """
    if dry_run and output is not None:
        raise UsageError("dry_run writes nothing, output is a folder to write to: give one of them")
    if output is not None:
        check_folder(Path(output))
    say = in_python(options.get("say"))
    results, times = (None if path is None else Path(path) for path in (evaluation, profile))
    made = push_job.package(hub.local(file), repo, results, times, options.get("licence"))
    for note in made.notes:
        say(f"note: {note}")
    revision, force = options.get("revision"), options.get("force", False)
    if output is not None:
        push_job.write(made, Path(output), force)
        return Pushed("", "", f"local-dir:{output}", made)
    if dry_run:
        return Pushed("", "", f"hf-hub:{repo}" + (f"@{revision}" if revision else ""), made)
    return push_job.push(made, options.get("private", False), revision, options.get("message"), force, say)


def _views(images: PathOrPaths, options: ViewOptions) -> tuple[Views, Any, Any]:
    """What is to be looked at, and who hears of it."""
    files = [Path(images)] if isinstance(images, str | Path) else [Path(image) for image in images]
    texts = [query if isinstance(query, str) else ",".join(map(str, query)) for query in options.get("queries", ())]
    layers, heads = (
        numbers if numbers is None or isinstance(numbers, str) else ",".join(map(str, numbers))
        for numbers in (options.get("layers"), options.get("heads"))
    )
    views = Views(files, [photograph.point(text) for text in texts], layers, heads)
    return views, options.get("say"), options.get("progress", False)


def _plain(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy in float32, eval mode."""
    return copy.deepcopy(cuda_graphs.plain(model)).to(device, torch.float32).eval()
