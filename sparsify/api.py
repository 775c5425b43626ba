"""The library in six functions; `import sparsify` shows them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from sparsify import config, processes
from sparsify.errors import UsageError, as_arguments
from sparsify.jobs.against import profile_against as profile_against_job
from sparsify.jobs.convert import Conversion, ImageSources, OutputOptions
from sparsify.jobs.convert import convert as convert_job
from sparsify.jobs.dense import DenseRequest, Preprocessing
from sparsify.jobs.export.program import Exported, ProgramOptions
from sparsify.jobs.export.program import export as export_job
from sparsify.jobs.export.program import export_pair as export_pair_job
from sparsify.jobs.save import save as save_job
from sparsify.keywords import (
    AgainstOptions,
    ComputeOptions,
    ConvertOptions,
    EvaluateOptions,
    PreprocessingOptions,
    ProfileOptions,
)
from sparsify.measure.accuracy import Evaluation
from sparsify.measure.adaptive import AdaptiveProfile
from sparsify.measure.adaptive import profile_adaptive as profile_adaptively
from sparsify.measure.against import Against
from sparsify.measure.evaluate import evaluate_images, own_compute
from sparsify.measure.figures import Profile
from sparsify.measure.latency import BUDGET_S, Budget
from sparsify.measure.profile import profile as profile_model
from sparsify.models import checkpoint, hub
from sparsify.models.original import Which, opened
from sparsify.nn import graft, guard
from sparsify.nn.adaptive import Adaptive, lead
from sparsify.nn.adaptive import adaptive as adaptively
from sparsify.processes import Compute, Listener, Say
from sparsify.recipe import Recipe, default_recipe, load_recipe

ModelOrFile = nn.Module | str | Path


def convert(
    name: str | Path,
    *,
    keep: float | str | Sequence[float | str] | None = None,
    recipe: str | Recipe | None = None,
    data: str | Path | None = None,
    weights: str | Path | None = None,
    output: str | Path = "model.safetensors",
    force: bool = False,
    **options: Unpack[ConvertOptions],
) -> Conversion:
    """Convert a timm model and write it to `output`.

    Args:
        name: alias, timm name, `hf-hub:` or `local-dir:` name, or `digits`.
        keep: fraction of keys that each query attends to, 0 < keep <= 1, or 'dense'; one value, or one for each block.
            With a target: the values to choose from for each block.
        recipe: name, YAML file or `Recipe`; None: `distill` with `data` and at most one target, else `calibrate`.
        data: folder or data set to calibrate on and to learn from. None: the built-in pictures, calibration only.
        weights: local checkpoint (.safetensors, .pth) of that architecture.
        output: file to write; its reports go beside it.
        force: overwrite a file that holds another model.
        target_macs, target_latency: choose keep and tokens of every block for this fraction of the dense model's MACs or
            time (give one of them). Several fractions: a schedule for each over one backbone, the first in
            use (`load(..., budget=)`, `model.set_budget`); nothing is trained then.
        runtime: where the model is to run: eager, compile, onnxruntime or openvino. For the last two a target is reached by
            fewer tokens alone, with dense attention: sparse attention is slower there.
        allow_nonfinite: take weights with NaN or infinity, which are refused otherwise.
        calibrate_only: leave out the stages of the recipe.
        val: labelled images that decide which weights are written; None: a part of `data` is held back.
        resume: continue the interrupted fine-tuning of this output (folder STEM.run beside it).
        num_classes: outputs of `weights`, 0 for features; None: read off the file. img_size: in pixels; None: the model's.
        ema: of `weights`, take the averaged ones (EMA), or the others; None: averaged where the file has them.
        device: of torch: cpu (default), cuda, cuda:1, mps. say: called with a line now and then.
        mean, std, crop_pct, interpolation, class_map: written into the file; see
            `sparsify.images.preprocessing.Preprocessing`.
        predictor, rank, tail, cells, spread, granularity, tile, fold, token_lowrank, tokens: fields of
            `SparsityConfig`; tokens is a mapping:
            {"keep": 0.7, "stages": (4, 7, 10), "way": "merge", "importance": "fitted"}.
        description, calib_images, seed, start, precision, hold_back, repair, stages: fields of `Recipe`.

    Raises:
        SparsifyError: one line: what was wrong, what was expected, what to do.
    """
    calibrate_only, val = options.pop("calibrate_only", False), options.pop("val", None)
    model = DenseRequest(
        os.fspath(name),
        None if weights is None else Path(weights),
        options.pop("num_classes", None),
        options.pop("img_size", None),
        options.pop("ema", None),
        _preprocessing(options),
        options.pop("allow_nonfinite", False),
    )
    written = OutputOptions(Path(output), force, options.pop("resume", False))
    compute, listener = Compute(device=options.pop("device", "cpu")), Listener(_in_python(options.pop("say", None)))
    keeps = tuple(keep) if isinstance(keep, Iterable) and not isinstance(keep, str) else keep
    to_try = None if keep is None else [None if each == "dense" else each for each in config.listed(keeps)]
    target = config.target(
        options.pop("target_macs", None), options.pop("target_latency", None), to_try, options.pop("runtime", "eager")
    )
    if recipe is None:
        recipe = default_recipe(data is not None and not calibrate_only and (target is None or len(target.shares) == 1))
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = chosen.override(keep=None if target else keeps, **options)
    if calibrate_only:
        chosen = chosen.without_training()
    images = ImageSources(None if data is None else str(data), None if val is None else str(val))
    return convert_job(model, chosen, written, images=images, target=target, compute=compute, listener=listener)


def load(
    path: str | Path,
    img_size: int | None = None,
    device: str | torch.device = "cpu",
    *,
    budget: float | None = None,
    adaptive: float | None = None,
    backend: str = "auto",
    kernel_precision: str = "input",
    **rates: float,
) -> nn.Module:
    """The sparse model of a file or of a hub's repository, eval mode, for inference or further training.

    For inference call it under `torch.inference_mode()` or `no_grad()`: where a gradient may be asked for, no dense
    attention stands in, and without kernels the slow differentiable reference computes. Predictors take no gradients: a
    choice of keys has none (`convert --data` trains them).

    Args:
        path: file; `hf-hub:ORG/NAME` or ORG/NAME of a repository that `sparsify push` wrote (@REVISION may follow),
            downloaded once; or `local-dir:FOLDER`.
        img_size: see `sparsify.models.checkpoint.read`.
        budget: of a file made for several targets, which of them; None: the first; 1: dense attention over all tokens. A
            model of a file that was made for a target has `set_budget`, to change it between calls.
        adaptive: mean cost of an image, a fraction of the dense model's: an `Adaptive` classifier that runs a cheap
            schedule, and a dearer one again where that is unsure (`sparsify.nn.adaptive`); its `rule` says which.
        backend: cpu or reference computes the sparse form always. auto: per attention shape whatever was measured fastest
            on this machine (about 0.3 s at the first call of a shape, then remembered on disk): the CPU kernels, or
            dense attention, unless the file's backbone was changed. From the first `model.train()` on, always sparse, in
            this model and its copies.
        kernel_precision: input, or bf16: queries, keys and values of float32 models are stored in bfloat16 by the kernels.
        rates: drop_rate, pos_drop_rate, proj_drop_rate, drop_path_rate of training, as timm's (0 to 1).

    Raises:
        BadFile: see `sparsify.models.checkpoint.read`.
        UsageError: an unknown backend, precision or rate, a budget or a mean cost that the file does not have, or backend
            cpu where the kernels cannot be used.
        SparsifyError: a download that failed, see `sparsify.models.hub.fetch`.
    """
    file = hub.local(path)
    if budget is not None and adaptive is not None:
        raise UsageError("give either budget, one schedule, or adaptive, two of them")
    target, loaded = processes.torch_device(device), checkpoint.read(file, img_size, rates, budget)
    rule = None if adaptive is None else loaded.header.rule(adaptive)
    model = graft.freeze_predictors(loaded.model.to(target))
    guard.set_backend(model, backend, kernel_precision, dense_allowed=not loaded.header.backbone_changed)
    return model if rule is None else adaptively(model, rule)


def save(model: nn.Module, path: str | Path, *, like: str | Path, force: bool = False) -> Path:
    """Writes a model that `load` gave and that was trained further to a file that `load` reads; see `jobs/save.py`.

    Args:
        model: weights, number of classes, pooling and image size may have changed; other modules may not. Wrappers
            (DistributedDataParallel, timm's ModelEmaV3, torch.compile) are taken off.
        like: what `load` was given: the settings and the provenance are taken from there. The new file says that its
            backbone was changed, if it was.
        force: overwrite a file that holds another model.

    Raises:
        SparsifyError: see `sparsify.jobs.save.save`; nothing is written then.
    """
    save_job(model, Path(path), hub.local(like), force)
    return Path(path)


def export(
    path: str | Path,
    format: str = "onnx",
    output: str | Path | None = None,
    *,
    budget: float | None = None,
    force: bool = False,
    say: Say | None = None,
    **options: Unpack[ProgramOptions],
) -> Exported:
    """Write the model of a file as a program without this package, ONNX, OpenVINO's or torch.export's; docs/export.md.

    Arguments and errors are those of `sparsify.jobs.export.program.export`; `say` is called with a line now and then.
    """
    return export_job(path, format, output, budget=budget, force=force, say=_in_python(say), **options)


def export_pair(
    path: str | Path,
    adaptive: float,
    format: str = "onnx",
    output: str | Path | None = None,
    *,
    force: bool = False,
    say: Say | None = None,
    **options: Unpack[ProgramOptions],
) -> tuple[Exported, Exported]:
    """Write the two programs of adaptive inference, with the rule in their metadata.

    Arguments and errors are those of `sparsify.jobs.export.program.export_pair`; `say` as in `export`.
    """
    return export_pair_job(path, adaptive, format, output, force=force, say=_in_python(say), **options)


def profile_adaptive(model: nn.Module, **options: Unpack[ComputeOptions]) -> AdaptiveProfile:
    """MACs and latency of adaptive inference, in the mean and at worst, beside the dense model.

    Args:
        model: what `load(..., adaptive=)` gave.
        batch_size, device, dtype, backend, kernel_precision: of the measurement (`sparsify.processes.Compute`).

    Raises:
        SparsifyError: another model, or see `sparsify.measure.profile.profile`.
    """
    return profile_adaptively(model, compute=_split(Compute(), options, ComputeOptions)[0])


def profile(model: ModelOrFile, *, dense: ModelOrFile | None = None, **options: Unpack[ProfileOptions]) -> Profile:
    """MACs and latency of a sparse model (or its file) beside its dense original.

    Args:
        dense: the original: a model; with a file also a name or checkpoint, which is checked against the file. None: the
            model's own weights without sparsity, or, for a file whose backbone was changed, no dense figures (None). Of a
            module nobody knows whether its weights were changed: say backbone_changed=True or give `dense`.
        batch_size, device, dtype, backend, kernel_precision: of the measurement (`sparsify.processes.Compute`).
        budget: of a file, see `load`.
        budget_s: about how many seconds to measure for, all models together (10), unless `repeats` says how many rounds.
        img_size, backbone_changed, measure, count_as: see `sparsify.measure.profile.profile`.

    Raises:
        SparsifyError: see `sparsify.measure.profile.profile` and `sparsify.models.original.load_original`.
    """
    if isinstance(model, Adaptive):
        raise UsageError("profile of an adaptive model: profile_adaptive(model) has its mean and its worst case")
    sparse, original, changed = _opened(model, dense, Which(options.pop("budget", None)))
    compute, rest = _split(Compute(), options, ProfileOptions)
    budget = Budget(rest.pop("budget_s", BUDGET_S), rest.pop("repeats", None))
    return profile_model(
        sparse, dense=original, compute=compute, budget=budget, **{"backbone_changed": changed, **rest}
    )


def profile_against(
    model: ModelOrFile,
    runtimes: Sequence[str] = ("all",),
    *,
    dense: ModelOrFile | None = None,
    **options: Unpack[AgainstOptions],
) -> Against:
    """Times of a sparse model (or its file) and its dense original side by side in several runtimes, in one interleaved run.

    `best_dense` of the result names the fastest dense way on this machine; `pairs[runtime].best_dense` has the converted
    model's speed beside it.

    Args:
        runtimes: eager, compile (torch.compile with frozen weights), onnxruntime, openvino, onnxruntime-int8, openvino-int8;
            or all that can run here, int8 ones with dtype bfloat16.
        dense, budget, repeats, budget_s, backbone_changed: as in `profile`; without a dense model there are no dense times.
        batch_size, device, dtype, backend, kernel_precision: of the measurement (`sparsify.processes.Compute`).
        say: called with a line now and then.

    Raises:
        SparsifyError: see `sparsify.jobs.against.profile_against` and `sparsify.models.original.load_original`.
    """
    if isinstance(model, Adaptive):
        raise UsageError("runtimes are compared by schedule: load the file with budget, not with adaptive")
    sparse, original, changed = _opened(model, dense, Which(options.pop("budget", None)))
    compute, rest = _split(Compute(), options, AgainstOptions)
    names = (runtimes,) if isinstance(runtimes, str) else tuple(runtimes)
    budget = Budget(rest.pop("budget_s", BUDGET_S), rest.pop("repeats", None))
    how: dict[str, Any] = {"say": _in_python(rest.pop("say", None)), "backbone_changed": changed, **rest}
    return profile_against_job(sparse, names, dense=original, compute=compute, budget=budget, **how)


def evaluate(
    model: ModelOrFile, images: str | Path, *, dense: ModelOrFile | None = None, **options: Unpack[EvaluateOptions]
) -> Evaluation:
    """Accuracy of a sparse model (or its file) beside its dense original on a labelled folder, timm data set or `digits`.

    The sparse form is computed, whatever `load` chose. Several processes that a launcher started share the images, and
    every one of them must call this.

    Args:
        dense, budget: as in `profile`. adaptive: of a file, see `load`; or give the model that `load` returned.
        batch_size, workers, device, dtype, backend, kernel_precision: see `sparsify.processes.Compute`.
        mean, std, crop_pct, interpolation, class_map: see `sparsify.images.preprocessing.Preprocessing`.
        name, strict, backbone_changed: see `sparsify.measure.evaluate.evaluate_images`.
        say: called with a line now and then; progress: with the images done, and how many there are (None: unknown).

    Raises:
        SparsifyError: see `sparsify.measure.evaluate.evaluate_images` and `sparsify.models.original.load_original`.
    """
    which = Which(options.pop("budget", None), options.pop("adaptive", None))
    sparse, original, changed = _opened(model, dense, which)
    compute, rest = _split(own_compute(sparse), options, EvaluateOptions)
    if given := _preprocessing(rest):
        sparse = _shallow_copy(sparse)  # the caller's model keeps its own
        given.apply(lead(sparse))
    tell = rest.pop("progress", lambda done, total: None)
    listener = Listener(_in_python(rest.pop("say", None)), lambda step, done, total: tell(done, total))
    return evaluate_images(
        sparse, str(images), dense=original, compute=compute, listener=listener, **{"backbone_changed": changed, **rest}
    )


def _shallow_copy(model: nn.Module) -> nn.Module:
    """The same tensors in a model whose attributes are its own."""
    if isinstance(model, Adaptive):
        return Adaptive(graft.shallow_copy(model.first), model.second, model.rule)
    return graft.shallow_copy(model)


def _preprocessing(options: Any) -> Preprocessing | None:
    """The preprocessing that `options` give, taken from them; None where they give nothing of it."""
    given = {name: options.pop(name, None) for name in PreprocessingOptions.__optional_keys__}
    given |= {name: tuple(given[name]) for name in ("mean", "std") if given[name] is not None}
    return None if all(value is None for value in given.values()) else Preprocessing(**given)


def _split(compute: Compute, options: Mapping[str, Any], known: Any) -> tuple[Compute, dict[str, Any]]:
    """`compute` with its fields that `options` give (None: as it is), and the other options; `known`: their TypedDict."""
    rest = dict(options)
    names = {field.name for field in fields(Compute)} & known.__optional_keys__ & rest.keys()
    given = {name: value for name in names if (value := rest.pop(name)) is not None}
    given |= {name: str(given[name]).removeprefix("torch.") for name in {"device", "dtype"} & given.keys()}
    return replace(compute, **given), rest


def _opened(model: ModelOrFile, dense: ModelOrFile | None, which: Which) -> tuple[nn.Module, nn.Module | None, bool]:
    """The sparse model, the dense one that was given, and whether the backbone is known to have changed."""
    if not isinstance(model, nn.Module):
        file = opened(hub.local(model), dense, which=which)
        return file.model, file.dense, file.header.backbone_changed
    if which != Which():
        raise UsageError("budget and adaptive are of a file; a model has model.set_budget, and load takes adaptive")
    if dense is None or isinstance(dense, nn.Module):
        return model, dense, False
    raise UsageError(f"dense {dense}: beside a model that is no file, the dense model itself is expected")


def _in_python(say: Say | None) -> Say:
    """`say`, told the fields that a line names as arguments."""
    return (lambda line: None) if say is None else lambda line: say(as_arguments(line))
