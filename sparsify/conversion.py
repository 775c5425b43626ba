"""The job behind `sparsify convert`: a name in, a calibrated sparse model in one file out, with its report."""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import __version__, checkpoint, data, digits, schedule, zoo
from sparsify.calibration import Calibration, calibrate, first, spends_ranks
from sparsify.config import SparsityConfig, Target
from sparsify.nn import graft
from sparsify.ops import backends
from sparsify.ops.spec import Execution
from sparsify.profiling import Profile, profile
from sparsify.recipe import Recipe, recipe_yaml
from sparsify.report import files

PROBE_IMAGES = 64  # of the calibration's that a schedule is chosen on
CALIBRATION_BATCH = 16  # images; bounds the memory of the widest step, the reference attention at four ranks


@dataclass(frozen=True)
class Conversion:
    """What `convert` made.

    Attributes:
        path: the model's file; `report_json` and `report_md` lie beside it, and `recipe` where a schedule was chosen.
        model: the sparse model, eval mode.
        header: what the file says of itself.
        profile: theoretical MACs, nothing measured.
        calibration: which images were used, in words.
        seconds: wall time from the dense model to the written file.
    """

    path: Path
    report_json: Path
    report_md: Path
    recipe: Path | None
    model: nn.Module
    header: checkpoint.Header
    profile: Profile
    calibration: str
    seconds: float


def convert(
    name: str,
    recipe: Recipe,
    output: Path,
    *,
    weights: Path | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    images: str | None = None,
    force: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    workers: int = 0,
    backend: str = "auto",
    target: Target | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Conversion:
    """Converts the model `name` by `recipe` and writes `output`.

    Args:
        images: folder or data set to calibrate on (labels are not used); None for the built-in set.
        dtype: of the forward passes of the calibration (autocast); moments are float64, the file is float32.
        workers: processes that read images.
        backend: what computes the sparse trials of the calibration (`sparsify.ops.BACKENDS`).
        target: choose keep and token keep of every block for it; the recipe's are the start of the calibration.
        say: called with lines for the person at the terminal.
        progress: called with step, images done and images in all.

    Raises:
        SparsifyError: see `zoo`, `data`, `graft` and `checkpoint`; nothing is written then.
    """
    source = zoo.resolve(name)
    if source.note:
        say(source.note)
    execution = Execution(backend)
    graft.check_execution(execution, torch.device(device), dtype)
    hosts = graft.check(zoo.skeleton(source, num_classes, img_size), source.asked)  # before anything is loaded
    recipe.sparsity.check(*graft.shape(hosts))
    model = zoo.load(source, weights, num_classes, img_size).to(device)
    architecture = zoo.describe(model, source)
    if differs := zoo.note(model, source):
        say(differs)
    checkpoint.may_overwrite(output, architecture, force)
    start = time.perf_counter()
    batches, calibration = calibration_images(
        model, source, recipe, images, device, batch_size or CALIBRATION_BATCH, workers
    )
    say(f"calibrating on {calibration}")
    if spends_ranks(recipe.sparsity) and (note := backends.note(backend, torch.device(device), dtype)):
        say(note)
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        result = calibrate(
            model,
            recipe.sparsity,
            batches,
            lambda step, done, total: progress(step, done, total or recipe.calib_images),
            execution,
        )
    config, chosen = result.config, None
    if target is not None:
        config, chosen = _choose(result, recipe, target, batches, execution, say, progress)
    sparse = result.model.to("cpu")
    figures = profile(sparse, measure=False)
    header = checkpoint.Header(
        architecture=architecture,
        config=config,
        provenance=_provenance(source.asked, weights, chosen or recipe, images is not None, result.images),
        report={k: v for k, v in figures.as_dict().items() if "macs" in k and isinstance(v, int)},
    )
    checkpoint.save(sparse, output, header)
    stem = output.name.removesuffix(".safetensors")
    report_json, report_md = output.with_name(f"{stem}.report.json"), output.with_name(f"{stem}.report.md")
    files.write_json(report_json, figures.as_dict())
    files.write_text(report_md, files.to_markdown(figures))
    recipe_file = None if chosen is None else output.with_name(f"{stem}.recipe.yaml")
    if chosen is not None and recipe_file is not None:
        files.write_text(recipe_file, recipe_yaml(chosen))
    seconds = time.perf_counter() - start
    return Conversion(output, report_json, report_md, recipe_file, sparse, header, figures, calibration, seconds)


def _choose(
    result: Calibration, recipe: Recipe, target: Target, batches: Callable[[], Iterator[Tensor]], execution: Execution,
    say: Callable[[str], None], progress: Callable[[str, int, int], None],
) -> tuple[SparsityConfig, Recipe]:  # fmt: skip
    """Applies the schedule for `target` to the calibrated model; its configuration, and the recipe that gives it again."""
    model, asked = result.model, recipe.sparsity
    config = result.config.model_copy(update={"cells": asked.cells, "tokens": asked.tokens})
    graft.set_execution(model, execution)
    probe = list(first(batches(), PROBE_IMAGES))
    total = sum(map(len, probe))
    measured = schedule.sensitivity(model, config, probe, target.keeps, lambda done: progress("schedule", done, total))
    if target.macs is not None:
        found = schedule.for_macs(model, config, measured, target.macs, schedule.dense_macs(model))
        words = f"{found.share:.3f} of the dense model's MACs, {target.macs:g} asked for"
    else:
        assert target.latency is not None
        found = schedule.for_latency(model, config, measured, target.latency, target.batch_size, say)
        words = (
            f"{found.share:.3f} of the dense model's time at batch {target.batch_size}, {target.latency:g} asked for"
        )
    graft.apply(model, found.config)
    prefix = graft.num_prefix_tokens(model)
    say(f"schedule: {words}")
    say("  tokens after each block  " + " ".join(str(n + prefix) for n in found.schedule.counts[1:]))
    say("  keep of each block       " + " ".join(f"{a:g}" if a else "dense" for a in found.schedule.keeps))
    config = found.config.with_cells(graft.num_tokens(model))
    sparsity = (
        config if asked.cells else config.model_copy(update={"cells": None})
    )  # ranks as found: they depend on keep
    description = f"{recipe.description.split('; schedule')[0]}; schedule for {words}"
    return config, recipe.model_copy(update={"sparsity": sparsity, "description": description})


def calibration_images(
    model: nn.Module, source: zoo.Source, recipe: Recipe, images: str | None, device: str, size: int, workers: int
) -> tuple[Callable[[], Iterator[Tensor]], str]:
    """The calibration images, read anew at each pass, and what they are in words."""
    transform = data.transform(data.data_config(model))
    n, seed = recipe.calib_images, recipe.seed
    built_in_digits = source.architecture == digits.ARCHITECTURE
    if images is not None:
        found = data.unlabelled(images, n, seed, transform, size, workers)
        words = f"up to {n} images of {images} (labels are not used)"
    else:
        found = data.builtin_calibration(built_in_digits, n, seed, transform, size, workers)
        words = f"{n} {'digits of the training split' if built_in_digits else 'built-in pictures'}: no --data was given"
    return lambda: (x.to(device) for x in found), words


def _provenance(asked: str, weights: Path | None, recipe: Recipe, own_images: bool, images: int) -> dict[str, Any]:
    libraries = {"sparsify-vit": __version__, "python": platform.python_version()}
    for library in ("torch", "timm", "safetensors"):
        with contextlib.suppress(Exception):
            libraries[library] = version(library)
    return {
        "source": asked,
        "weights": weights.name if weights else None,
        "recipe": recipe.model_dump(mode="json"),
        "calibration": {"images": images, "set": "user" if own_images else "built-in"},
        "backbone_changed": False,
        "versions": libraries,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }
