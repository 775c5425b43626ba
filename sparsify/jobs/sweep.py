"""The job behind `sparsify sweep`: one calibrated model, measured at several keeps and searched schedules beside dense.

The model is converted once and its sensitivity measured once. All settings share its weights, see the same images in one
pass, in which the dense model computes once, and are timed in turns with it in one run. Each is a recipe that `convert`
takes: ranks and cells are written out, so that the same images give the same model again.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify.config import SparsityConfig
from sparsify.errors import BadFile, UsageError
from sparsify.fit.calibrate.calibrate import calibrate, first_images, fit_importance, spends_ranks
from sparsify.fit.schedule import choose as schedule
from sparsify.fit.schedule.choose import FoundSchedule
from sparsify.jobs.dense import CALIBRATION_BATCH, PROBE_IMAGES, calibration_images
from sparsify.measure import evaluate, latency
from sparsify.measure.conditions import SWEEP, conditions
from sparsify.measure.latency import Timing
from sparsify.measure.macs import image_shape, replica
from sparsify.measure.profile import profile
from sparsify.measure.sweep import Setting, Sweep, SweepChoice
from sparsify.models import building, checkpoint, names, pretrained
from sparsify.nn import graft, hosts
from sparsify.nn.attention import Execution
from sparsify.nn.execution import check_execution, set_execution
from sparsify.ops import backends
from sparsify.processes import Compute
from sparsify.recipe import Recipe

SECONDS = 2.5  # of timing, for each model; `latency.BUDGET_S` at least


def sweep(
    name: str,
    recipe: Recipe,
    images: str,
    *,
    targets: Sequence[float],
    keeps: Sequence[float],
    must_be_labelled: bool = False,
    weights: Path | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    calib: str | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    workers: int = 0,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int, int | None], None] = lambda step, done, total: None,
) -> Sweep:
    """Converts the model `name` by `recipe` and measures it at every keep and target. No file is written.

    Args:
        recipe: its keep and tokens are the calibration's; the settings have their own.
        images: to evaluate on (`data.labelled`); a folder of loose images has no labels, which leaves agreement.
        targets: shares of the dense model's MACs, a schedule is searched for each; keeps: of keys, all tokens stay.
        must_be_labelled: loose images are an error.
        calib: images to calibrate on; None: the built-in ones.
        limit: images to evaluate on, drawn by the recipe's seed; None: all.
        batch_size: images of a timed forward pass.

    Raises:
        SparsifyError: see `zoo`, `data`, `graft`; also where no setting is possible.
    """
    start = time.perf_counter()
    source = _dense_source(name)
    if source.note:
        say(source.note)
    where, execution = torch.device(device), Execution(backend)
    check_execution(execution, where, dtype)
    frame = building.skeleton(source, num_classes, img_size)  # what does not fit is refused before anything is loaded
    hosts.check(frame, source.asked)
    graft.check_config(frame, recipe.sparsity)
    check_execution(execution, where, dtype, hosts.biased(frame))
    model = pretrained.load(source, weights, num_classes, img_size).to(where)
    if differs := building.note(model, source):
        say(differs)
    classes = int(cast(Any, model).num_classes)
    shown, labelled = evaluate.images_of(model, images, must_be_labelled, limit, recipe.seed, workers)
    if shown.note:
        say(shown.note)
    if not labelled:
        say(f"{images} has no class folders: no accuracy, only how far the models agree with dense")

    batches, calibration = calibration_images(model, source, recipe, calib, device, CALIBRATION_BATCH, workers)
    calibration = calibration.replace("no --data was given", "no --calib was given")
    say(f"calibrating on {calibration}")
    if spends_ranks(recipe.sparsity) and (note := backends.note(backend, where, dtype, hosts.biased(frame))):
        say(note)
    with torch.autocast(where.type, dtype, enabled=dtype != torch.float32):
        fitted = calibrate(
            model, recipe.sparsity, batches,
            lambda step, done, total: progress(step, done, total or recipe.calib_images), execution,
        )  # fmt: skip
    set_execution(model, execution)
    config = fitted.config.model_copy(update={"cells": recipe.sparsity.cells, "tokens": None})
    choices, skipped = _choices(model, config, batches, targets, keeps, say, progress)
    if not choices:
        raise UsageError("nothing to measure: " + "; ".join(skipped.values()))
    profiles = []
    for done, choice in enumerate(choices):
        profiles.append(profile(graft.applied(model, choice.config), measure=False))
        progress("MACs", done + 1, len(choices))

    base = replica(model, where, dtype)
    set_execution(base, execution)
    dense = graft.dense_twin(base)
    sparse = {choice.name: graft.applied(base, choice.config) for choice in choices}
    compute = Compute(device, str(dtype).removeprefix("torch."), batch_size=batch_size)
    found = evaluate.compare(
        dense, sparse, shown, labelled, compute, lambda done: progress("eval", done, shown.total)
    )
    if shown.broken:
        say(f"{shown.broken} images could not be read and are left out; the first: {shown.first_broken}")
    say(f"timing {len(sparse) + 1} models in turns")
    times, speeds = _time({"dense": dense, **sparse}, batch_size, where, dtype)
    return Sweep(
        model=source.asked,
        weights=None if weights is None else weights.name,
        architecture=source.architecture,
        classes=classes,
        images=images,
        calibration=calibration,
        labelled=labelled,
        settings=tuple(
            Setting(
                choice,
                _recipe_of(choice, recipe),
                macs,
                replace(found[choice.name], model=choice.name, broken=shown.broken),
                times[choice.name],
                speeds[choice.name],
            )
            for choice, macs in zip(choices, profiles, strict=True)
        ),
        dense=times["dense"],
        skipped=skipped,
        conditions=conditions(
            SWEEP,
            compute,
            img_size=list(image_shape(model)[1:]),
            runs=times["dense"].runs,
            backend=backends.describe(backend, execution.precision, where, dtype, hosts.biased(base)),
        ),
        convert=_command(name, weights, num_classes, img_size, calib, dtype),
        seconds=time.perf_counter() - start,
    )


def _dense_source(name: str) -> names.Source:
    """`zoo.resolve`, with another word for files that `convert` wrote."""
    if name.endswith(".safetensors"):
        try:
            known = str(checkpoint.read_header(Path(name)).provenance.get("source") or "deit_small")
        except BadFile:
            known = "deit_small"
        raise UsageError(
            f"'{name}' is a file: a sweep starts from the dense model, give its name, such as {known} (and --weights "
            "FILE for a checkpoint of your own)"
        )
    return names.resolve(name)


def _choices(
    model: nn.Module, config: SparsityConfig, batches: Callable[[], Iterator[Tensor]], targets: Sequence[float],
    keeps: Sequence[float], say: Callable[[str], None], progress: Callable[[str, int, int | None], None],
) -> tuple[list[SweepChoice], dict[str, str]]:  # fmt: skip
    """The settings of a calibrated model, and those that cannot be, with the reason; `config`: cells as asked."""
    tokens = hosts.num_tokens(model)
    chosen = [
        SweepChoice(f"keep-{keep:g}", keep, config.model_copy(update={"keep": keep}).with_cells(tokens), None)
        for keep in keeps
    ]
    skipped: dict[str, str] = {}
    if not targets:
        return chosen, skipped
    fit_importance(model, batches, progress)
    probe = list(first_images(batches(), PROBE_IMAGES))
    total = sum(map(len, probe))
    measured = schedule.sensitivity(
        model, config, probe, progress=lambda done: progress("sensitivity", done, total)
    )  # fmt: skip
    dense = schedule.dense_macs(model)
    for target in targets:
        name = f"macs-{target:g}"
        try:
            found: FoundSchedule = schedule.for_macs(model, config, measured, target, dense)
        except UsageError as error:  # the other settings are worth having
            reason = str(error).partition(": ")[2] or str(error)
            skipped[name] = f"target {target:g}: {reason}"
            say(f"left out, {skipped[name]}")
            continue
        say(f"schedule: {found.share:.3f} of the dense model's MACs, {target:g} asked for")
        chosen.append(SweepChoice(name, target, found.config.with_cells(tokens), found.schedule.damage))
    return chosen, skipped


def _recipe_of(choice: SweepChoice, recipe: Recipe) -> Recipe:
    """What gives the setting's model again: its configuration as it is, the ranks that were spent among it."""
    what = f"keep {choice.asked:g}" if choice.kind == "keep" else f"schedule for {choice.asked:g} of the dense MACs"
    return recipe.model_copy(
        update={"sparsity": choice.config, "description": f"{what}, chosen by 'sparsify sweep'"}
    )  # fmt: skip


def _command(
    name: str, weights: Path | None, num_classes: int | None, img_size: int | None, calib: str | None,
    dtype: torch.dtype,
) -> tuple[str, ...]:  # fmt: skip
    """The words of the `convert` that calibrates as the sweep did, without its recipe and output."""
    options = {
        "--weights": weights, "--num-classes": num_classes, "--img-size": img_size, "--data": calib,
        "--dtype": None if dtype == torch.float32 else str(dtype).removeprefix("torch."),
    }  # fmt: skip
    given = [word for key, value in options.items() if value is not None for word in (key, shlex.quote(str(value)))]
    return ("sparsify", "convert", shlex.quote(name), *given)


def _time(
    models: Mapping[str, nn.Module], batch_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Forward passes of all models over one random batch, in turns: ms, and times faster than dense by round."""
    shape = image_shape(models["dense"])
    images = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    every: dict[str, list[float]] = {name: [] for name in models}  # the warm-up among it

    def run(name: str) -> None:
        begin = time.perf_counter()
        models[name](images)
        wait()
        every[name].append(time.perf_counter() - begin)

    times = latency.interleaved(
        {name: partial(run, name) for name in models},
        budget_s=max(latency.BUDGET_S, SECONDS * len(models)),
        synchronize=wait,
    )
    rounds = {name: every[name][-times[name].runs :] for name in models}
    ratios = {name: [d / s for d, s in zip(rounds["dense"], own, strict=True)] for name, own in rounds.items()}
    return times, {name: latency.timing(own) for name, own in ratios.items()}
