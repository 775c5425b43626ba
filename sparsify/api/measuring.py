"""MACs, time and accuracy of a sparse model beside its dense original."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from sparsify.api.arguments import (
    Images,
    ModelOrFile,
    dense_request,
    device_of,
    given_images,
    in_python,
    listening,
    opened_pair,
    preprocessing,
    split,
)
from sparsify.errors import UsageError
from sparsify.images.listed import ImagePaths
from sparsify.images.measured import EvaluationImages
from sparsify.jobs import sweep as sweep_job
from sparsify.jobs.against import profile_against as profile_against_job
from sparsify.jobs.predict import TOP, Prediction, predictions
from sparsify.keywords import (
    AgainstOptions,
    ComputeOptions,
    EvaluateOptions,
    PredictOptions,
    ProfileOptions,
    SweepOptions,
)
from sparsify.measure.accuracy import Evaluation
from sparsify.measure.adaptive import AdaptiveProfile
from sparsify.measure.adaptive import profile_adaptive as profile_adaptively
from sparsify.measure.against import Against
from sparsify.measure.evaluate import evaluate_images, own_compute
from sparsify.measure.figures import Profile
from sparsify.measure.latency import BUDGET_S, Budget
from sparsify.measure.profile import profile as profile_model
from sparsify.measure.sweep import Sweep
from sparsify.models.original import Which
from sparsify.nn import graft
from sparsify.nn.adaptive import Adaptive, lead
from sparsify.processes import Compute
from sparsify.recipe import load_recipe


def profile_adaptive(model: nn.Module, **options: Unpack[ComputeOptions]) -> AdaptiveProfile:
    """Measure MACs and latency of adaptive inference, in the mean and at worst, beside the dense model.

    Args:
        model: what `load(..., adaptive=)` gave.

    Keyword Args:
        batch_size: images of a timed forward pass; None: 1.
        device: of torch: cpu, cuda, cuda:1, mps.
        dtype: float32, bfloat16 or float16.
        backend: auto (the CPU kernels if they can run), cpu or reference.
        kernel_precision: input, or bf16: the kernels store queries, keys and values of float32 models in bfloat16.

    Returns:
        MACs and times by schedule, in the mean and at worst.

    Raises:
        SparsifyError: another model, or one that cannot be measured.
    """
    return profile_adaptively(model, compute=split(Compute(), options, ComputeOptions)[0])


def profile(model: ModelOrFile, *, dense: ModelOrFile | None = None, **options: Unpack[ProfileOptions]) -> Profile:
    """Measure MACs and latency of a sparse model, or its file, beside its dense original.

    Args:
        model: sparse model or its file.
        dense: the original: a model; with a file also a name or checkpoint, which is checked against the file. None: the
            model's own weights without sparsity, or, for a file whose backbone was changed, no dense figures (None). Of a
            module nobody knows whether its weights were changed: say backbone_changed=True or give `dense`.

    Keyword Args:
        batch_size: images of a timed forward pass; None: 1.
        device: of torch: cpu, cuda, cuda:1, mps.
        dtype: float32, bfloat16 or float16.
        backend: auto (the CPU kernels if they can run), cpu or reference.
        kernel_precision: input, or bf16: the kernels store queries, keys and values of float32 models in bfloat16.
        budget: of a file, which schedule; None: the file's first.
        budget_s: about how many seconds to measure for, all models together (10), unless `repeats` is given.
        repeats: how many rounds to measure.
        img_size: side in pixels, or (height, width); None: the model's.
        backbone_changed: of a module: its weights are not the dense original's.
        measure: False counts MACs only.
        count_as: product; or paper: also attention by the accounting of the paper's authors.

    Returns:
        Figures by module and in all; `as_dict()` has them as plain data.

    Raises:
        SparsifyError: no sparse model, a dense model that cannot be compared, or two counts that differ.
    """
    if isinstance(model, Adaptive):
        raise UsageError("profile of an adaptive model: profile_adaptive(model) has its mean and its worst case")
    sparse, original, changed = opened_pair(model, dense, Which(options.pop("budget", None)))
    compute, rest = split(Compute(), options, ProfileOptions)
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
    """Time a sparse model, or its file, and its dense original side by side in several runtimes, in one interleaved run.

    `best_dense` of the result names the fastest dense way on this machine; `pairs[runtime].best_dense` has the converted
    model's speed beside it.

    Args:
        model: sparse model or its file.
        runtimes: eager, compile (torch.compile with frozen weights), onnxruntime, openvino, onnxruntime-int8, openvino-int8;
            or all that can run here, int8 ones with dtype bfloat16.
        dense: as in `profile`; without a dense model there are no dense times.

    Keyword Args:
        batch_size: images of a timed forward pass; None: 1.
        device: of torch: cpu, cuda, cuda:1, mps.
        dtype: float32, bfloat16 or float16.
        backend: auto (the CPU kernels if they can run), cpu or reference.
        kernel_precision: input, or bf16: the kernels store queries, keys and values of float32 models in bfloat16.
        budget: of a file, which schedule; None: the file's first.
        budget_s: about how many seconds to measure for, all models together, unless `repeats` is given.
        repeats: how many rounds to measure.
        backbone_changed: of a module: its weights are not the dense original's.
        say: called with a line now and then.

    Returns:
        Times and speeds by runtime.

    Raises:
        SparsifyError: no sparse model, a runtime that is unknown or not installed, or a dense model that cannot be compared.
    """
    if isinstance(model, Adaptive):
        raise UsageError("runtimes are compared by schedule: load the file with budget, not with adaptive")
    sparse, original, changed = opened_pair(model, dense, Which(options.pop("budget", None)))
    compute, rest = split(Compute(), options, AgainstOptions)
    names = (runtimes,) if isinstance(runtimes, str) else tuple(runtimes)
    budget = Budget(rest.pop("budget_s", BUDGET_S), rest.pop("repeats", None))
    how: dict[str, Any] = {"say": in_python(rest.pop("say", None)), "backbone_changed": changed, **rest}
    return profile_against_job(sparse, names, dense=original, compute=compute, budget=budget, **how)


def evaluate(
    model: ModelOrFile, images: str | Path, *, dense: ModelOrFile | None = None, **options: Unpack[EvaluateOptions]
) -> Evaluation:
    """Measure accuracy of a sparse model, or its file, and how far it agrees with its dense original.

    The sparse form is computed, whatever `load` chose. Several processes that a launcher started share the images, and
    every one of them must call this.

    Args:
        model: sparse model or its file.
        images: labelled folder, timm data set or `digits`; of loose images: agreement with dense only.
        dense: the original: a model; with a file also a name or checkpoint, which is checked against the file. None: the
            model's own weights without sparsity, or, for a file whose backbone was changed, no dense figures (None).

    Keyword Args:
        no_labels: use none, and compare with dense only.
        limit: images to measure on, drawn by `seed` and spread over the classes; None: all.
        seed: of the choice of images; 0.
        budget: of a file, which schedule; None: the file's first.
        adaptive: of a file, see `load`; or give the model that `load` returned.
        batch_size: images computed together; None: 32.
        workers: processes that read images; 0: this one.
        device: of torch: cpu, cuda, cuda:1, mps. The model is moved there.
        dtype: float32, bfloat16, float16 or float64. The model is cast to it.
        backend: auto (the CPU kernels if they can run), cpu or reference.
        kernel_precision: input, or bf16: the kernels store queries, keys and values of float32 models in bfloat16.
        mean: of the preprocessing; this and the next four replace the model's own.
        std: see `convert`.
        crop_pct: see `convert`.
        interpolation: see `convert`.
        class_map: see `convert`.
        name: of the model in the results.
        strict: an image that cannot be read is an error.
        backbone_changed: of a module: its weights are not the dense original's.
        say: called with a line now and then.
        progress: True shows bars in a notebook or at a terminal; a function is called with the images done, and how many
            there are (None: unknown).

    Returns:
        Top-1, top-5, agreement, KL and more; percentages from 0 to 100; None where a figure does not apply.

    Raises:
        SparsifyError: no sparse model, a dense model that cannot be compared, no images, or labels that do not fit.
    """
    which = Which(options.pop("budget", None), options.pop("adaptive", None))
    sparse, original, changed = opened_pair(model, dense, which)
    sparse, compute, rest = _for_images(sparse, options, EvaluateOptions)
    say, tell = rest.pop("say", None), rest.pop("progress", False)
    heard = tell if isinstance(tell, bool) else lambda step, done, total: tell(done, total) if step == "eval" else None
    use_labels = False if rest.pop("no_labels", False) else None
    shown = EvaluationImages(str(images), use_labels, rest.pop("limit", None), rest.pop("seed", 0))
    how: dict[str, Any] = {"backbone_changed": changed, **rest}
    with listening(say, heard) as listener:
        return evaluate_images(sparse, shown, dense=original, compute=compute, listener=listener, **how)


def predict(
    model: ModelOrFile, images: str | Path | Sequence[str | Path], *, top: int = TOP, **options: Unpack[PredictOptions]
) -> list[Prediction]:
    """Name the most probable classes of images, in the order of the images, by a sparse model or its file.

    The sparse form is computed, whatever `load` chose. An image that cannot be read is left out. Features of images:
    `sparsify.jobs.predict.write_features`.

    Args:
        model: sparse model or its file.
        images: files, folders (every image below), .tar, timm data sets or `digits`: one of these or several.
        top: how many classes of each image.

    Keyword Args:
        budget: of a file, which schedule; None: the file's first.
        adaptive: of a file, see `load`; or give the model that `load` returned.
        batch_size: images computed together; None: 32.
        workers: processes that read images; 0: this one.
        device: of torch: cpu, cuda, cuda:1, mps. The model is moved there.
        dtype: float32, bfloat16, float16 or float64. The model is cast to it.
        backend: auto (the CPU kernels if they can run), cpu or reference.
        kernel_precision: input, or bf16: the kernels store queries, keys and values of float32 models in bfloat16.
        mean: of the preprocessing; this and the next four replace the model's own.
        std: see `convert`.
        crop_pct: see `convert`.
        interpolation: see `convert`.
        class_map: see `convert`.
        strict: an image that cannot be read is an error.
        limit: how many images, drawn by `seed` and spread over the folders; None: all.
        seed: of the choice of images; 0.
        say: called with a line now and then.
        progress: as in `convert`.

    Returns:
        For each image its name and the classes with their probabilities, the most probable first.

    Raises:
        SparsifyError: no sparse model or no classifier, or images that are not there.
    """
    sparse, _, _ = opened_pair(model, None, Which(options.pop("budget", None), options.pop("adaptive", None)))
    sparse, compute, rest = _for_images(sparse, options, PredictOptions)
    paths = (images,) if isinstance(images, str | Path) else tuple(images)
    with listening(rest.pop("say", None), rest.pop("progress", False)) as listener:
        shown = ImagePaths(tuple(map(str, paths)), **rest)
        return list(predictions(sparse, shown, top=top, compute=compute, listener=listener))


def sweep(
    model: str | Path | nn.Module,
    images: str | Path,
    *,
    targets: Sequence[float] = (0.8, 0.7, 0.55, 0.4),
    keeps: Sequence[float] = (0.25, 0.1, 0.05),
    calib: Images | None = None,
    weights: str | Path | None = None,
    output: str | Path | None = None,
    **options: Unpack[SweepOptions],
) -> Sweep:
    """Measure accuracy, MACs and time of one model at several keeps and MACs targets, beside dense.

    Args:
        model: name of a dense model, or a ViT of timm (`nn.Module`), as in `convert`.
        images: to measure on: labelled folder, timm data set or `digits`; of loose images: agreement only.
        targets: fractions of the dense model's MACs to search a schedule for.
        keeps: fractions of keys to measure sparse attention at, with all tokens.
        calib: images to calibrate on, as `data` of `convert`; None: the built-in pictures.
        weights: of a name: local checkpoint of that architecture.
        output: start of the names of what is written: PREFIX.md, .json, .png, and a recipe for each setting in
            PREFIX.recipes. None: nothing is written.

    Keyword Args:
        no_labels: use none, and compare with dense only.
        limit: images to measure on, drawn by `seed` and spread over the classes; None: all.
        calib_images: images to calibrate on, at most; None: 128.
        seed: of the choice of images; None: 0.
        num_classes: outputs of `weights`, 0 for features; None: read off the file.
        img_size: of a name: side in pixels; None: the model's.
        ema: of `weights`, take the averaged ones (EMA), or the others; None: averaged where the file has them.
        batch_size: images of a timed forward pass; None: 1.
        device: of torch: cpu, cuda, cuda:1, mps; None: the module's, or cpu for a name.
        dtype: float32, bfloat16 or float16.
        backend: what computes sparse attention: auto (the CPU kernels if they can run), cpu or reference.
        workers: processes that read images; 0: this one.
        say: called with a line now and then.
        progress: as in `convert`.

    Returns:
        The settings with their recipes and figures, and the dense model's time.

    Raises:
        SparsifyError: a model, image set or output that cannot be used; also where no setting is possible.
    """
    request = dense_request(model, weights, options)
    compute, rest = split(Compute(device=device_of(request)), options, SweepOptions)
    say, progress = rest.pop("say", None), rest.pop("progress", False)
    use_labels, limit = False if rest.pop("no_labels", False) else None, rest.pop("limit", None)
    recipe = load_recipe("calibrate").override(**rest)  # what is unknown is refused there
    on = EvaluationImages(str(images), use_labels, limit, recipe.seed)
    with listening(say, progress) as listener:
        run = partial(
            sweep_job.sweep,
            request,
            recipe,
            on,
            targets=tuple(targets),
            keeps=tuple(keeps),
            calib=given_images(calib, "calib"),
            compute=compute,
            listener=listener,
        )
        return run() if output is None else sweep_job.written(Path(output), run).sweep


def _for_images(model: nn.Module, options: Any, keywords: type) -> tuple[nn.Module, Compute, dict[str, Any]]:
    """The model with the preprocessing that `options` name, how it computes, and the options that are left."""
    compute, rest = split(own_compute(model), options, keywords)
    if given := preprocessing(rest):
        model = _shallow_copy(model)  # the caller's model keeps its own
        given.apply(lead(model))
    return model, compute, rest


def _shallow_copy(model: nn.Module) -> nn.Module:
    """The same tensors in a model whose attributes are its own."""
    if isinstance(model, Adaptive):
        return Adaptive(graft.shallow_copy(model.first), model.second, model.rule)
    return graft.shallow_copy(model)
