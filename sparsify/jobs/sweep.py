"""The job behind `sparsify sweep`: one calibrated model, measured at several keeps and searched schedules beside dense.

The model is converted once and its sensitivity measured once. All settings share its weights, see the same images in one
pass, in which the dense model computes once, and are timed in turns with it in one run. Each is a recipe that `convert`
takes: ranks and cells are written out, so that the same images give the same model again.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sparsify.errors import BadFile, UsageError, as_options, field
from sparsify.files.destinations import check_folder
from sparsify.files.locks import reserved
from sparsify.fit.calibrate.calibrate import Calibration
from sparsify.fit.schedule.choose import KEEPS, dense_macs, for_macs
from sparsify.images.given import GivenImages
from sparsify.images.measured import EvaluationImages
from sparsify.images.trainset import trainset
from sparsify.jobs.dense import Calibrator, DenseRequest, load_dense
from sparsify.measure import evaluate, latency, passes
from sparsify.measure.conditions import SWEEP, conditions
from sparsify.measure.latency import Timing
from sparsify.measure.macs import image_shape, replica
from sparsify.measure.profile import profile
from sparsify.measure.sweep import Setting, Sweep, SweepChoice
from sparsify.models import building, checkpoint
from sparsify.nn import graft, hosts, schedules
from sparsify.nn.attention import Execution
from sparsify.nn.execution import set_execution
from sparsify.ops import backends
from sparsify.processes import Compute, Listener
from sparsify.recipe import Recipe

SECONDS = 2.5  # of timing, for each model; `latency.BUDGET_S` at least


@building.in_float32()
def sweep(
    request: DenseRequest,
    recipe: Recipe,
    images: EvaluationImages,
    *,
    targets: Sequence[float],
    keeps: Sequence[float],
    calib: str | GivenImages | None = None,
    compute: Compute = Compute(),
    listener: Listener = Listener(),
) -> Sweep:
    """Converts a dense model by `recipe` and measures it at every keep and target. No file is written.

    Args:
        recipe: how to calibrate; each setting has its own keep and tokens.
        targets: fractions of the dense model's MACs; a schedule is searched for each.
        keeps: fractions of keys; all tokens stay.
        calib: images to calibrate on; None: the built-in set.
        compute: its batch size is that of the timed forward passes (default 1).

    Raises:
        SparsifyError: a model, recipe or image set that cannot be used; also where no setting is possible.
    """
    start, say, progress = time.perf_counter(), listener.say, listener.progress
    _refuse_file(request.name)
    device, dtype, execution = compute.torch_device, compute.torch_dtype, Execution(compute.backend)
    loaded = load_dense(request, recipe.sparsity, compute, listener)
    source, model = loaded.source, loaded.model
    shown, labelled, _ = evaluate.batches_of(evaluate.Described.of(model), images, replace(compute, batch_size=None))
    if shown.note:
        say(shown.note)

    calibrator = Calibrator.on(
        trainset(calib) if isinstance(calib, str) else calib,
        loaded,
        recipe,
        replace(compute, batch_size=None),
        listener,
        "calib",
    )
    calibrated = calibrator.calibrate(model, recipe.sparsity, (*keeps, *(KEEPS if targets else ())))
    choices, skipped = _choices(calibrated, targets, keeps, calibrator)
    if not choices:
        raise UsageError("nothing to measure: " + "; ".join(skipped.values()))
    profiles = []
    for done, choice in enumerate(choices):
        profiles.append(profile(schedules.applied(model, choice.config), measure=False))
        progress("MACs", done + 1, len(choices))

    base = replica(model, device, dtype)
    set_execution(base, execution)
    dense = graft.dense_twin(base)
    sparse = {choice.name: schedules.applied(base, choice.config) for choice in choices}
    evaluations = passes.compare(
        dense,
        sparse,
        shown,
        compute,
        lambda done: progress("eval", done, shown.total),
        partial(progress, "neighbours"),
    )
    for line in shown.flaws.lines():
        say(line)
    if nonfinite := max(e.nonfinite for e in evaluations.values()):
        say(f"warning: {nonfinite} images give outputs that are not finite; they count as disagreement")
    say(f"timing {len(sparse) + 1} models in turns")
    batch_size = compute.batch_size or 1
    times, speeds = _time({"dense": dense, **sparse}, batch_size, device, dtype)
    named = {name: replace(figures, model=name, broken=shown.flaws.broken) for name, figures in evaluations.items()}
    settings = tuple(
        Setting(choice, _recipe_of(choice, recipe), macs, named[choice.name], times[choice.name], speeds[choice.name])
        for choice, macs in zip(choices, profiles, strict=True)
    )
    return Sweep(
        model=source.asked,
        weights=None if request.weights is None else request.weights.name,
        architecture=source.architecture,
        classes=int(cast(Any, model).num_classes),
        images=images.path,
        calibration=as_options(calibrator.words),
        labelled=labelled,
        settings=settings,
        dense=times["dense"],
        skipped=skipped,
        conditions=conditions(
            SWEEP,
            compute,
            batch_size=batch_size,
            img_size=list(image_shape(model)[1:]),
            runs=times["dense"].runs,
            backend=backends.describe(compute.backend, execution.precision, device, dtype, hosts.biased(base)),
        ),
        convert=_command(request, calib if isinstance(calib, str) else None, compute.dtype),
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class SweepFiles:
    """A sweep, and what was written of it."""

    sweep: Sweep
    paths: tuple[Path, ...]
    note: str  # one line where there is no picture, else ''


def written(prefix: Path, run: Callable[[], Sweep]) -> SweepFiles:
    """Runs a sweep and writes PREFIX.md, .json, .png and .recipes, which are held meanwhile.

    Raises `BadFile` before anything runs where they cannot be written.
    """
    from sparsify.reports.sweep import outputs, recipe_folder, write

    with reserved(*outputs(prefix)):
        check_folder(recipe_folder(prefix))
        result = run()
        paths, note = write(result, prefix)
    return SweepFiles(result, tuple(paths), note)


def _refuse_file(name: str) -> None:
    """Raise for the name of a file that `convert` wrote."""
    if not name.endswith(".safetensors"):
        return
    try:
        known = str(checkpoint.read_header(Path(name)).provenance.get("source") or "deit_small")
    except BadFile:
        known = "deit_small"
    raise UsageError(
        f"'{name}' is a file: a sweep starts from the dense model, give its name, such as {known} (and "
        f"{field('weights')} FILE for a checkpoint of your own)"
    )


def _choices(
    calibrated: Calibration, targets: Sequence[float], keeps: Sequence[float], calibrator: Calibrator
) -> tuple[list[SweepChoice], dict[str, str]]:
    """The settings of a calibrated model, and those that are impossible, with the reason."""
    model, config = calibrated.model, calibrated.config.model_copy(update={"tokens": None})
    of_keep = [calibrated.budgets.model(keep).model_copy(update={"tokens": None}) for keep in keeps]
    choices = [SweepChoice(f"keep-{keep:g}", keep, each, None) for keep, each in zip(keeps, of_keep, strict=True)]
    skipped: dict[str, str] = {}
    if not targets:
        return choices, skipped
    sensitivity, macs = calibrator.sensitivity(calibrated, None), dense_macs(model)
    for number, target in enumerate(targets, 1):
        name = f"macs-{target:g}"
        calibrator.listener.progress("search", number, len(targets))
        try:
            found = for_macs(model, config, sensitivity, target, macs)
        except UsageError as error:  # the other settings can still be measured
            reason = str(error).partition(": ")[2] or str(error)
            skipped[name] = f"target {target:g}: {reason}"
            calibrator.listener.say(f"left out, {skipped[name]}")
            continue
        calibrator.listener.say(f"schedule: {found.share:.3f} of the dense model's MACs, target {target:g}")
        choices.append(SweepChoice(name, target, graft.filled(model, found.config), found.schedule.damage))
    return choices, skipped


def _recipe_of(choice: SweepChoice, recipe: Recipe) -> Recipe:
    """The recipe that reproduces a setting's model: its whole configuration, calibrated ranks included."""
    what = f"keep {choice.asked:g}" if choice.kind == "keep" else f"schedule for {choice.asked:g} of the dense MACs"
    return recipe.model_copy(update={"sparsity": choice.config, "description": f"{what}, chosen by 'sparsify sweep'"})


def _command(request: DenseRequest, calib: str | None, dtype: str) -> tuple[str, ...]:
    """The words of the `convert` that calibrates as the sweep did, without its recipe and output."""
    options = {
        "--weights": request.weights,
        "--num-classes": request.num_classes,
        "--img-size": request.img_size,
        "--data": calib,
        "--dtype": None if dtype == "float32" else dtype,
    }
    given = [word for key, value in options.items() if value is not None for word in (key, shlex.quote(str(value)))]
    if request.ema is not None:
        given.append("--ema" if request.ema else "--no-ema")
    return ("sparsify", "convert", shlex.quote(request.name or "NAME"), *given)


def _time(
    models: Mapping[str, nn.Module], batch_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Forward passes of all models over one random batch, in turns: ms, and times faster than dense by round."""
    shape = image_shape(models["dense"])
    images = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rounds = latency.by_round(
        {name: partial(model, images) for name, model in models.items()},
        budget_s=max(latency.BUDGET_S, SECONDS * len(models)),
        device=device,
    )
    ratios = {name: [d / s for d, s in zip(rounds["dense"], own, strict=True)] for name, own in rounds.items()}
    times, faster = ({name: latency.summary(own) for name, own in each.items()} for each in (rounds, ratios))
    return times, faster
