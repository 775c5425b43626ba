"""The job behind `sparsify convert`: a name in, a calibrated sparse model in one file out, with its report."""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify import extras, processes
from sparsify.config import SparsityConfig, Target
from sparsify.errors import UsageError, as_arguments, field
from sparsify.files.locks import reserved
from sparsify.files.outputs import write_all
from sparsify.fit.calibrate.calibrate import Calibration
from sparsify.fit.finetune.plan import Plan, RunOptions, TrainingData, check_stage, make_plan
from sparsify.fit.finetune.run import RunResult
from sparsify.fit.finetune.run_folder import RunFolder
from sparsify.fit.schedule import choose
from sparsify.images.given import GivenImages
from sparsify.images.trainset import TrainSet, trainset
from sparsify.jobs.dense import Calibrator, Dense, DenseRequest, load_dense
from sparsify.jobs.tune import Calibrated, Tuned, tune
from sparsify.measure.figures import Profile
from sparsify.measure.profile import profile
from sparsify.models import building, checkpoint, module
from sparsify.models.header import Schedule
from sparsify.nn import graft, hosts, schedules, token_models
from sparsify.processes import Compute, Listener
from sparsify.recipe import Recipe, recipe_yaml
from sparsify.reports.header import budgets_markdown, by_head
from sparsify.reports.profile import to_markdown
from sparsify.reports.words import publishable
from sparsify.version import __version__


@dataclass(frozen=True)
class ImageSources:
    """Images of a conversion, folders or data sets."""

    # calibrate on, and learn from if the recipe has stages; None: built-in, calibration only. Tensors: calibration only
    train: str | GivenImages | None = None
    val: str | None = None  # labelled, to decide which weights are written; None: a part of `train` is held back


@dataclass(frozen=True)
class OutputOptions:
    """What a conversion writes."""

    path: Path  # the model's file; its reports and the folder of a fine-tuning go beside it
    force: bool = False  # overwrite another model's file, or discard an unfinished fine-tuning
    resume: bool = False  # continue the interrupted fine-tuning of this output
    save_minutes: float = 5.0  # between two saved states of a fine-tuning

    def beside(self, ending: str) -> Path:
        """STEM.ending in the folder of the file."""
        return self.path.with_name(f"{self.path.name.removesuffix('.safetensors')}.{ending}")


@dataclass(frozen=True)
class Conversion:
    """What `convert` made."""

    path: Path | None  # the model's file, the reports beside it; None: nothing was written
    report_json: Path | None
    report_md: Path | None
    recipe: Path | None  # where one schedule was chosen
    # the sparse model, eval mode, on the CPU in float32; of a module that the caller gave see `sparsify.api.conversion`
    model: nn.Module
    header: checkpoint.Header  # header of the file, also if none was written
    profile: Profile  # theoretical MACs of the schedule in use, nothing measured
    profiles: Mapping[float, Profile]  # the same of every budget of the target, from the largest
    calibration: str  # which images were used, in words
    seconds: float  # wall time from the dense model to the written file
    tuning: RunResult | None = None  # how the fine-tuning went; None where there was none
    run: Path | None = None  # folder of the fine-tuning


@building.in_float32()
def convert(
    request: DenseRequest,
    recipe: Recipe,
    output: OutputOptions | None,
    *,
    images: ImageSources = ImageSources(),
    target: Target | None = None,
    compute: Compute = Compute(),
    listener: Listener = Listener(),
) -> Conversion:
    """Converts a dense model by `recipe` and writes `output`; None: no file, which a recipe that trains needs.

    Args:
        target: choose keep and token keep of every block for it, once for each of its shares; the recipe's are the start of
            the calibration. Of several the first is in use, and nothing is trained.
        compute: dtype: of the calibration's forward passes (autocast; moments are float64, the file is float32);
            batch_size: images of such a pass; micro_batch: of the fine-tuning; backend: of the calibration's sparse trials.

    Raises:
        SparsifyError: a model, recipe, image set or output that cannot be used; nothing is written then.
        Interrupted: a fine-tuning was asked to stop; its state is saved.
    """
    compute = replace(compute, device=processes.local_device(compute.device))
    processes.start(compute.device)
    endings = ("report.json", "report.md", *(["recipe.yaml"] if _one_schedule(target) else []))
    with contextlib.ExitStack() as held:
        with processes.agree():
            if processes.main() and output is not None:
                held.enter_context(reserved(output.path, *map(output.beside, endings)))
        return _convert(request, recipe, output, images, target, compute, listener)


def _convert(
    request: DenseRequest,
    recipe: Recipe,
    output: OutputOptions | None,
    images: ImageSources,
    target: Target | None,
    compute: Compute,
    listener: Listener,
) -> Conversion:
    """`convert`, while nobody else writes the output."""
    with processes.agree():
        if recipe.start == "random" and recipe.sparsity.predictor != "token-lowrank":
            raise UsageError("start random is the authors' way for predictor token-lowrank: use start closed-form")
        if recipe.trains and target is not None and len(target.shares) > 1:
            given, only = field(f"target_{target.of}"), field("calibrate_only")
            raise UsageError(f"{given}: weights are trained for one target; give one, or train nothing ({only})")
        if recipe.trains and output is None:
            needs = "this recipe trains, and a fine-tuning keeps its state beside the file that it writes"
            raise UsageError(f"{needs}: give {field('output')} FILE, or calibrate only ({field('calibrate_only')})")
        if recipe.trains and images.train is not None:
            extras.need(f"fine-tuning ({field('calibrate_only')} leaves it out)", "accelerate")
        dense = load_dense(request, _calibrated_config(recipe, target), compute, listener)
        model = dense.model
        if target is not None:  # its schedule removes tokens
            token_models.check_host(model)
        architecture, dense_sha256 = building.describe(model, dense.source), checkpoint.digest_of(model)
        if output is not None:
            if request.module is not None:
                module.check_described(model, dense.source, architecture)
            checkpoint.may_overwrite(output.path, architecture, output.force)
        plan = _plan(model, recipe, images, dense_sha256, target, compute)
        fitted_to = plan.images if plan else images.train
        if isinstance(fitted_to, str):
            fitted_to = trainset(fitted_to)
    start = time.perf_counter()
    about = {
        "source": None if request.module is not None else _public_name(dense.source.asked),
        "weights": request.weights.name if request.weights else None,
        "dense_sha256": dense_sha256,
    } | ({} if dense.averaged is None else {"ema": dense.averaged})
    if request.module is not None:
        about["module"] = True
    if dense.source.foreign is not None:
        about["transformers"] = dense.source.foreign.model_type
    calibrated = partial(_calibrated, dense, recipe, fitted_to, target, compute, listener)

    def header(found: Calibrated, config: SparsityConfig, tuned: Tuned | None = None) -> checkpoint.Header:
        provenance = about | _provenance(found, images.train is not None) | (tuned.provenance() if tuned else {})
        configs = found.schedules if len(found.schedules) > 1 else dict.fromkeys(found.schedules, config)
        several = {budget: Schedule(each, {}) for budget, each in configs.items()}
        return checkpoint.Header(architecture, config, provenance, {}, several, found.sureness)

    tuned, run = None, None
    if plan is None:
        found = calibrated()
        sparse, config = found.model.to("cpu"), found.config
        if images.train is None:
            listener.say(f"calibrated only: {field('data')} FOLDER gives training images")
    else:
        assert output is not None
        run = RunFolder(output.beside("run"))
        how = RunOptions(run.path, compute.device, output.save_minutes, listener)
        tuned = tune(
            model, plan, run, how, calibrated, lambda found: header(found, found.config), output.resume, output.force
        )
        found, sparse, config = tuned.start, tuned.model, tuned.config
    written, figures = _reported(sparse, header(found, config, tuned), listener)
    if written.schedules and written.budget is not None:
        schedules.offer(sparse, {b: each.config for b, each in written.schedules.items()}, written.budget)
    made = Conversion(
        path=None if output is None else output.path,
        report_json=None if output is None else output.beside("report.json"),
        report_md=None if output is None else output.beside("report.md"),
        recipe=output.beside("recipe.yaml") if output is not None and _one_schedule(target) else None,
        model=sparse,
        header=written,
        profile=next(iter(figures.values())),
        profiles={budget: figures[budget] for budget in written.schedules},
        calibration=as_arguments(found.words),
        seconds=0.0,
        tuning=None if tuned is None else tuned.outcome,
        run=None if run is None else run.path,
    )
    if processes.main() and output is not None:
        _write(made, found.recipe, output)
        if run is not None:
            run.finish(output.path)
    processes.barrier()
    return replace(made, seconds=time.perf_counter() - start)


def _reported(
    model: nn.Module, header: checkpoint.Header, listener: Listener
) -> tuple[checkpoint.Header, dict[float | None, Profile]]:
    """The header with theoretical MACs, and the profile behind them by budget, first that of the schedule in use."""
    others = header.schedules.keys() - {header.budget}
    listener.progress("MACs", 0, 1 + len(others))
    figures: dict[float | None, Profile] = {header.budget: profile(model, measure=False)}
    for number, budget in enumerate(others, 1):
        listener.progress("MACs", number, 1 + len(others))
        figures[budget] = profile(schedules.applied(model, header.schedules[budget].config), measure=False)
    listener.progress("MACs", 1 + len(others), 1 + len(others))
    reports = {
        budget: {k: v for k, v in each.as_dict().items() if "macs" in k and isinstance(v, int)}
        for budget, each in figures.items()
    }
    several = {budget: each._replace(report=reports[budget]) for budget, each in sorted(header.schedules.items())[::-1]}
    return header._replace(report=reports[header.budget], schedules=several), figures


def _one_schedule(target: Target | None) -> bool:
    return target is not None and len(target.shares) == 1


def _write(made: Conversion, recipe: Recipe, output: OutputOptions) -> None:
    """The model's file and what lies beside it."""
    checkpoint.save(made.model, output.path, made.header)
    figures, words = made.profile.as_dict(), to_markdown(made.profile)
    if len(made.profiles) > 1:
        figures["budgets"] = {f"{budget:g}": each.as_dict() for budget, each in made.profiles.items()}
        words = budgets_markdown(made.header) + "\n" + words
    beside: dict[Path, Any] = {output.beside("report.json"): figures, output.beside("report.md"): words}
    if made.recipe is not None:
        beside[made.recipe] = recipe_yaml(recipe)
    write_all(beside)


def _calibrated_config(recipe: Recipe, target: Target | None) -> SparsityConfig:
    """The configuration to calibrate: without tokens where a search chooses them afterwards."""
    return recipe.sparsity if target is None else recipe.sparsity.model_copy(update={"tokens": None})


def _plan(
    model: nn.Module, recipe: Recipe, images: ImageSources, dense_sha256: str, target: Target | None, compute: Compute
) -> Plan | None:
    """The fine-tuning of `recipe`; None where it has none."""
    if not recipe.trains:
        return None
    if images.train is None:
        give, or_not = field("data"), field("calibrate_only")
        raise UsageError(f"this recipe trains on images: give them with {give}, or calibrate only ({or_not})")
    if isinstance(images.train, GivenImages):
        give, or_not = field("data"), field("calibrate_only")
        raise UsageError(
            f"this recipe trains on image files, which it crops at random: give {give} a folder or a data set instead of "
            f"tensors, or calibrate only ({or_not})"
        )
    plan = make_plan(model, recipe, TrainingData(images.train, images.val), compute, dense_sha256)
    asked = None if target is None else target.model_dump(mode="json")
    return replace(plan, identity=plan.identity | {"target": asked})


def _calibrated(
    dense: Dense,
    recipe: Recipe,
    images: TrainSet | GivenImages | None,
    target: Target | None,
    compute: Compute,
    listener: Listener,
) -> Calibrated:
    """The model with its predictors fitted (or drawn at random, as the recipe says), and a schedule chosen for a target."""
    model = dense.model
    if recipe.start == "random":
        config = graft.filled(model, recipe.sparsity)
        if config.tokens is not None:  # nothing is fitted
            config = config.model_copy(update={"tokens": config.tokens.model_copy(update={"importance": "attention"})})
        graft.reset_predictors(graft.graft(model, config), recipe.seed)
        return Calibrated(model, config, recipe, "nothing: predictors are drawn at random", 0)
    calibrator = Calibrator.on(images, dense, recipe, compute, listener)
    calibration = calibrator.calibrate(model, _calibrated_config(recipe, target), target.keeps if target else ())
    made = Calibrated(calibration.model, calibration.config, recipe, calibrator.words, calibration.images)
    if target is None:
        if words := by_head(made.config):
            listener.say(f"distributed over the heads, means and ranges: {words}")
        return made
    made = _with_schedules(made, calibration, target, calibrator)
    for stage in made.recipe.stages:  # the schedule may remove tokens
        check_stage(stage, made.config, int(getattr(model, "num_classes", 0)))
    return made


def _with_schedules(made: Calibrated, calibration: Calibration, target: Target, calibrator: Calibrator) -> Calibrated:
    """`made` with a schedule for each share of `target`, the first in use, and the recipe that reproduces that one."""
    model, say, tokens = made.model, calibrator.listener.say, made.recipe.sparsity.tokens
    config = made.config.model_copy(update={"tokens": tokens})
    sensitivity = calibrator.sensitivity(calibration, tokens, target, "schedule")
    dense = choose.dense_macs(model)
    what = "MACs" if target.of == "macs" else f"time at batch {target.batch_size}"
    configs, descriptions, prefix = {}, [], hosts.num_prefix_tokens(model)
    for number, share in enumerate(target.shares):
        calibrator.listener.progress("search", number, len(target.shares))
        if target.of == "macs":
            found = choose.for_macs(model, config, sensitivity, share, dense, target.overhead)
        else:
            found = choose.for_latency(model, config, sensitivity, share, target.batch_size, say)
        descriptions.append(f"schedule for {found.share:.3f} of the dense model's {what}, target {share:g}")
        say(descriptions[-1].replace(" for", ":", 1))
        say("  tokens after each block  " + " ".join(str(n + prefix) for n in found.schedule.counts[1:]))
        say("  keep of each block       " + " ".join(f"{keep:g}" if keep else "dense" for keep in found.schedule.keeps))
        configs[share] = graft.filled(model, found.config)
    calibrator.listener.progress("search", len(target.shares), len(target.shares))
    first = configs[target.shares[0]]
    schedules.apply(model, first, configs.values())
    sure = {} if made.recipe.trains else calibrator.sureness(model, configs)
    if len(configs) > 1:
        asked = ", ".join(f"{share:g}" for share in target.shares)
        descriptions = [f"schedules for {asked} of the dense model's {what}, the first in the recipe"]
    description = f"{made.recipe.description.split('; schedule')[0]}; {descriptions[0]}"
    recipe = made.recipe.model_copy(update={"sparsity": first, "description": description})
    return replace(made, config=first, recipe=recipe, schedules=configs, sureness=sure)


def _provenance(found: Calibrated, own_images: bool) -> dict[str, Any]:
    """Recipe, calibration and circumstances, as the file's header has them."""
    libraries = {"sparsify-vit": __version__, "python": platform.python_version()}
    for library in ("torch", "timm", "safetensors", "accelerate"):
        with contextlib.suppress(Exception):
            libraries[library] = version(library)
    return {
        "recipe": found.recipe.model_dump(mode="json"),
        "calibration": {"images": found.images, "set": "user" if own_images else "built-in"},
        "backbone_changed": False,
        "versions": libraries,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }


def _public_name(source: str) -> str:
    """A model's name for the file; of a local folder its last part alone."""
    scheme, _, folder = source.partition(":")
    return f"{scheme}:{publishable(str(Path(folder).resolve()), 1)}" if scheme == "local-dir" else source
