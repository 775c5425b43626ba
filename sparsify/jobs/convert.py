"""The job behind `sparsify convert`: a name in, a calibrated sparse model in one file out, with its report."""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import processes
from sparsify.config import SparsityConfig, Target, Tokens
from sparsify.errors import UsageError
from sparsify.files import publishable, write_json, write_text
from sparsify.fit.calibrate.calibrate import Calibration, calibrate, first_images, fit_importance, spends_ranks
from sparsify.fit.finetune import run_folder, run_status
from sparsify.fit.finetune.plan import Plan, TrainingData, check_stage, make_plan
from sparsify.fit.finetune.run_status import RunResult
from sparsify.fit.schedule import choose
from sparsify.jobs import tune as tuning
from sparsify.jobs.dense import CALIBRATION_BATCH, PROBE_IMAGES, _fitted_first, _loaded, calibration_images
from sparsify.jobs.tune import Calibrated, Tuned
from sparsify.measure.figures import Profile
from sparsify.measure.profile import profile
from sparsify.models import building, checkpoint, names
from sparsify.nn import graft, hosts, token_models
from sparsify.nn.attention import Execution
from sparsify.nn.execution import check_execution, set_execution
from sparsify.ops import backends
from sparsify.processes import Compute, Listener
from sparsify.recipe import Recipe, recipe_yaml
from sparsify.report.profile import to_markdown
from sparsify.version import __version__


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
        tuning: how the fine-tuning went; None where there was none.
        run: folder of the fine-tuning.
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
    tuning: RunResult | None = None
    run: Path | None = None


def convert(
    name: str,
    recipe: Recipe,
    output: Path,
    *,
    weights: Path | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    images: str | None = None,
    val: str | None = None,
    force: bool = False,
    resume: bool = False,
    save_minutes: float = 5.0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    micro_batch: int = 64,
    workers: int = 0,
    backend: str = "auto",
    target: Target | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[..., None] = lambda *step: None,
) -> Conversion:
    """Converts the model `name` by `recipe` and writes `output`.

    Args:
        images: folder or data set to calibrate on and, where the recipe has stages, to learn from; None for the built-in
            set (calibration only).
        val: labelled images that decide which weights are written; None: a part of `images` is held back.
        resume: go on with the run of this output that was interrupted; save_minutes: time between two saved states.
        dtype: of the forward passes of the calibration (autocast); moments are float64, the file is float32.
        batch_size: images of a pass of the calibration; micro_batch: most images of a pass of the fine-tuning.
        workers: processes that read images.
        backend: what computes the sparse trials of the calibration (`sparsify.ops.backends.BACKENDS`).
        target: choose keep and token keep of every block for it; the recipe's are the start of the calibration.
        say: called with lines for the person at the terminal.
        progress: called with step, images (or steps) done, how many in all, and a note.

    Raises:
        SparsifyError: see `zoo`, `data`, `graft`, `checkpoint` and `finetune`; nothing is written then.
        Interrupted: a fine-tuning was asked to stop; its state is saved.
    """
    device = processes.local_device(device)
    processes.start(device)
    execution = Execution(backend)
    check_execution(execution, torch.device(device), dtype)
    with processes.agree():
        source, model = _loaded(name, recipe, target, weights, num_classes, img_size, say)
        check_execution(execution, torch.device(device), dtype, hosts.biased(model))
        if target is not None:  # its schedule lets tokens leave
            token_models.check(model)
        architecture, dense_sha256 = building.describe(model, source), checkpoint.digest_of(model)
        checkpoint.may_overwrite(output, architecture, force)
        data = None if images is None else TrainingData(images, val)
        compute = Compute(device, workers=workers, micro_batch=micro_batch)
        plan = _planned(model, recipe, data, compute, dense_sha256, target)
    model.to(device)
    start = time.perf_counter()

    def calibrated() -> Calibrated:
        return _calibrated(
            model, source, recipe, images, target, device, dtype, batch_size or CALIBRATION_BATCH, workers, execution, say,
            progress,
        )  # fmt: skip

    def header(found: Calibrated, config: SparsityConfig, tuned: Tuned | None) -> checkpoint.Header:
        about = _provenance(source.asked, weights, found, images is not None, dense_sha256)
        return checkpoint.Header(architecture, config, about | (tuned.provenance() if tuned else {}), {})

    tuned, run = None, None
    if plan is None:
        found = calibrated()
        sparse, config = found.model.to("cpu"), found.config
        if images is None:
            say("calibrated only: --data FOLDER gives images to learn from")
    else:
        run = run_folder.RunFolder(output.with_name(f"{output.name.removesuffix('.safetensors')}.run"))
        how = run_status.RunOptions(run.path, device, save_minutes, Listener(say, progress))
        tuned = tuning.tune(model, plan, run, how, calibrated, lambda c: header(c, c.config, None), resume, force)
        found, sparse, config = tuned.start, tuned.model, tuned.config
    figures = profile(sparse, measure=False)
    report = {k: v for k, v in figures.as_dict().items() if "macs" in k and isinstance(v, int)}
    described = header(found, config, tuned)._replace(report=report)
    stem = output.name.removesuffix(".safetensors")
    report_json, report_md = output.with_name(f"{stem}.report.json"), output.with_name(f"{stem}.report.md")
    recipe_file = None if target is None else output.with_name(f"{stem}.recipe.yaml")
    if processes.main():
        checkpoint.save(sparse, output, described)
        write_json(report_json, figures.as_dict())
        write_text(report_md, to_markdown(figures))
        if recipe_file is not None:
            write_text(recipe_file, recipe_yaml(found.recipe))
        if run is not None:
            run.finish(output)
    processes.barrier()
    seconds = time.perf_counter() - start
    return Conversion(
        output, report_json, report_md, recipe_file, sparse, described, figures, found.words, seconds,
        None if tuned is None else tuned.outcome, None if run is None else run.path,
    )  # fmt: skip


def _planned(
    model: nn.Module, recipe: Recipe, data: TrainingData | None, compute: Compute, dense_sha256: str,
    target: Target | None,
) -> Plan | None:  # fmt: skip
    """The fine-tuning of `recipe`; None where it has none."""
    if not recipe.trains:
        return None
    if data is None:
        raise UsageError("this recipe learns from images: give them with --data, or calibrate only (--calibrate-only)")
    plan = make_plan(model, recipe, data, compute, dense_sha256)
    asked = None if target is None else target.model_dump(mode="json")
    return replace(plan, identity=plan.identity | {"target": asked})


def _calibrated(
    model: nn.Module, source: names.Source, recipe: Recipe, images: str | None, target: Target | None, device: str,
    dtype: torch.dtype, batch_size: int, workers: int, execution: Execution, say: Callable[[str], None],
    progress: Callable[..., None],
) -> Calibrated:  # fmt: skip
    """The model with its predictors fitted (or drawn at random, as the recipe says), and a schedule chosen for a target."""
    if recipe.start == "random":
        config = recipe.sparsity.with_cells(hosts.num_tokens(model))
        if config.tokens is not None:  # nothing is fitted
            config = config.model_copy(update={"tokens": config.tokens.model_copy(update={"importance": "attention"})})
        graft.draw(graft.graft(model, config), recipe.seed)
        return Calibrated(model, config, recipe, "nothing: predictors are drawn at random", 0)
    batches, words = calibration_images(model, source, recipe, images, device, batch_size, workers)
    say(f"calibrating on {words}")
    note = backends.note(execution.backend, torch.device(device), dtype, hosts.biased(model))
    if note and spends_ranks(recipe.sparsity):
        say(note)
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        result = calibrate(
            model,
            _fitted_first(recipe, target),
            batches,
            lambda step, done, total: progress(step, done, total or recipe.calib_images),
            execution,
        )
    if target is None:
        return Calibrated(result.model, result.config, recipe, words, result.images)
    config, chosen = _choose(result, recipe, target, batches, execution, say, progress)
    for stage in chosen.stages:  # tokens may leave now
        check_stage(stage, chosen.sparsity, int(getattr(model, "num_classes", 0)))
    return Calibrated(result.model, config, chosen, words, result.images)


def _choose(
    result: Calibration, recipe: Recipe, target: Target, batches: Callable[[], Iterator[Tensor]], execution: Execution,
    say: Callable[[str], None], progress: Callable[..., None],
) -> tuple[SparsityConfig, Recipe]:  # fmt: skip
    """Applies the schedule for `target` to the calibrated model; its configuration, and the recipe that gives it again."""
    model, asked = result.model, recipe.sparsity
    if (asked.tokens or Tokens()).importance == "fitted":
        fit_importance(model, batches, lambda step, done, total: progress(step, done, recipe.calib_images))
    config = result.config.model_copy(update={"cells": asked.cells, "tokens": asked.tokens})
    set_execution(model, execution)
    probe = list(first_images(batches(), PROBE_IMAGES))
    total = sum(map(len, probe))
    measured = choose.sensitivity(model, config, probe, target.keeps, lambda done: progress("schedule", done, total))
    if target.macs is not None:
        found = choose.for_macs(model, config, measured, target.macs, choose.dense_macs(model))
        words = f"{found.share:.3f} of the dense model's MACs, {target.macs:g} asked for"
    else:
        assert target.latency is not None
        found = choose.for_latency(model, config, measured, target.latency, target.batch_size, say)
        words = (
            f"{found.share:.3f} of the dense model's time at batch {target.batch_size}, {target.latency:g} asked for"
        )
    graft.apply(model, found.config)
    prefix = hosts.num_prefix_tokens(model)
    say(f"schedule: {words}")
    say("  tokens after each block  " + " ".join(str(n + prefix) for n in found.schedule.counts[1:]))
    say("  keep of each block       " + " ".join(f"{a:g}" if a else "dense" for a in found.schedule.keeps))
    config = found.config.with_cells(hosts.num_tokens(model))
    sparsity = (
        config if asked.cells else config.model_copy(update={"cells": None})
    )  # ranks as found: they depend on keep
    description = f"{recipe.description.split('; schedule')[0]}; schedule for {words}"
    return config, recipe.model_copy(update={"sparsity": sparsity, "description": description})


def _provenance(
    asked: str, weights: Path | None, found: Calibrated, own_images: bool, dense_sha256: str
) -> dict[str, Any]:
    libraries = {"sparsify-vit": __version__, "python": platform.python_version()}
    for library in ("torch", "timm", "safetensors", "accelerate"):
        with contextlib.suppress(Exception):
            libraries[library] = version(library)
    return {
        "source": _named(asked),
        "weights": weights.name if weights else None,
        "recipe": found.recipe.model_dump(mode="json"),
        "calibration": {"images": found.images, "set": "user" if own_images else "built-in"},
        "backbone_changed": False,
        "dense_sha256": dense_sha256,
        "versions": libraries,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }


def _named(source: str) -> str:
    """A model's name for the file; of a folder its last part alone."""
    scheme, _, folder = source.partition(":")
    return f"{scheme}:{publishable(str(Path(folder).resolve()), 1)}" if scheme == "local-dir" else source
