"""The library in five functions; `import sparsify` shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.config import Target, validate
from sparsify.errors import UsageError
from sparsify.jobs import convert as _conversion
from sparsify.jobs import save as _saving
from sparsify.jobs.export import program
from sparsify.jobs.export.program import Exported
from sparsify.measure import evaluate as _evaluation
from sparsify.measure import figures
from sparsify.measure import profile as _profiling
from sparsify.measure.accuracy import Evaluation
from sparsify.models import checkpoint, hub, original
from sparsify.nn import execution, graft
from sparsify.nn.attention import Execution
from sparsify.ops.auto import Chooser
from sparsify.processes import Compute, Listener
from sparsify.recipe import Recipe, default_recipe, load_recipe


def convert(
    name: str,
    *,
    keep: float | str | Sequence[float | str] | None = None,
    target_macs: float | None = None,
    target_latency: float | None = None,
    recipe: str | Recipe | None = None,
    calibrate_only: bool = False,
    output: str | Path = "model.safetensors",
    weights: str | Path | None = None,
    data: str | Path | None = None,
    val: str | Path | None = None,
    resume: bool = False,
    num_classes: int | None = None,
    img_size: int | None = None,
    force: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    **changes: Any,
) -> _conversion.Conversion:
    """Convert a timm model and write it to `output`.

    Args:
        name: alias, timm name, `hf-hub:` or `local-dir:` name, or `digits`.
        keep: share of keys that each query attends to, 0 < keep <= 1, or 'dense'; one value, or one for each block.
        target_macs, target_latency: choose keep and tokens of every block for this share of the dense model's (one of them;
            `keep` must be left out then).
        recipe: name, YAML file or `Recipe`; None: `distill` with `data`, else `calibrate`.
        calibrate_only: leave out the stages of the recipe.
        weights: local checkpoint (.safetensors, .pth) of that architecture.
        data: folder or data set to calibrate on and to learn from. None: the built-in pictures, calibration only.
        val: labelled images that decide which weights are written; None: a part of `data` is held back.
        resume: go on with the interrupted fine-tuning of this output (folder STEM.run beside it).
        changes: fields of `SparsityConfig` or `Recipe` (tokens, predictor, rank, tail, cells, seed, calib_images, ...);
            tokens is a mapping: {"keep": 0.7, "stages": (4, 7, 10), "way": "merge", "importance": "fitted"}.

    Raises:
        SparsifyError: one line: what was wrong, what was expected, what to do.
    """
    name_or_file = default_recipe(data is not None and not calibrate_only) if recipe is None else recipe
    chosen = name_or_file if isinstance(name_or_file, Recipe) else load_recipe(name_or_file)
    chosen = chosen.override(
        keep=keep if keep is None or isinstance(keep, float | int | str) else tuple(keep),
        **changes,
    )  # fmt: skip
    if calibrate_only:
        chosen = chosen.without_training()
    target = None
    if target_macs is not None or target_latency is not None:
        if keep is not None:
            raise UsageError("keep and a target: the search chooses keep; leave one of them out")
        target = validate(Target, {"macs": target_macs, "latency": target_latency}, "argument target")
    return _conversion.convert(
        name, chosen, Path(output), weights=None if weights is None else Path(weights), num_classes=num_classes,
        img_size=img_size, images=None if data is None else str(data), val=None if val is None else str(val), resume=resume,
        force=force, device=device, target=target, say=say,
    )  # fmt: skip


def load(
    path: str | Path,
    img_size: int | None = None,
    device: str | torch.device = "cpu",
    *,
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
        img_size: see `sparsify.models.checkpoint.load`.
        backend: cpu or reference computes the sparse form always. auto: per attention shape whatever was measured fastest
            on this machine (about 0.3 s at the first call of a shape, then remembered on disk): the CPU kernels, or
            dense attention, unless the file's backbone was changed. From the first `model.train()` on, always sparse, in
            this model and its copies.
        kernel_precision: input, or bf16: queries, keys and values of float32 models are stored in bfloat16 by the kernels.
        rates: drop_rate, pos_drop_rate, proj_drop_rate, drop_path_rate of training, as timm's (0 to 1).

    Raises:
        BadFile: see `sparsify.models.checkpoint.load`.
        UsageError: an unknown backend, precision or rate, or backend cpu where the kernels cannot be used.
        SparsifyError: a download that failed, see `sparsify.models.hub.fetch`.
    """
    file = hub.local(path)
    changed = checkpoint.read_header(file).backbone_changed
    model = graft.freeze_predictors(checkpoint.load(file, img_size, device, rates))
    fallback = backend == "auto" and not changed
    execution.set_execution(model, Execution(backend, kernel_precision, fallback, Chooser() if fallback else None))
    return model


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
    _saving.save(model, Path(path), hub.local(like), force)
    return Path(path)


def export(path: str | Path, format: str = "onnx", output: str | Path | None = None, **options: Any) -> Exported:
    """Write the model of a file as a program that runs without this package, ONNX or torch.export's; docs/export.md.

    Args:
        options: see `sparsify.jobs.export.program.export` (batch_size, img_size, force).

    Raises:
        SparsifyError: see `sparsify.jobs.export.program.export`.
    """
    return program.export(path, format, output, **options)


def profile(
    model: nn.Module | str | Path, *, dense: nn.Module | str | Path | None = None, **options: Any
) -> figures.Profile:
    """MACs and latency of a sparse model (or its file) beside its dense original.

    Args:
        dense: the original: a model; with a file also a name or checkpoint, which is checked against the file. None: the
            model's own weights without sparsity, or, for a file whose backbone was changed, no dense figures (None). Of a
            module nobody knows whether its weights were changed: say backbone_changed=True or give `dense`.
        options: batch_size (1), dtype, device, backend, kernel_precision of the measurement, as in
            `sparsify.processes.Compute`; img_size, measure, repeats, count_as, backbone_changed: see
            `sparsify.measure.profile.profile`.

    Raises:
        SparsifyError: see `sparsify.measure.profile.profile` and `sparsify.models.original.load_original`.
    """
    sparse, beside, changed = _opened(model, dense)
    options, compute = _compute(options, Compute(), "batch_size", "dtype", "device", "backend", "kernel_precision")
    return _profiling.profile(sparse, dense=beside, compute=compute, **{"backbone_changed": changed} | options)


def evaluate(
    model: nn.Module | str | Path,
    images: str | Path,
    *,
    dense: nn.Module | str | Path | None = None,
    **options: Any,
) -> Evaluation:
    """Accuracy of a sparse model (or its file) beside its dense original on a labelled folder, timm data set or `digits`.

    The sparse form is computed, whatever `load` chose. Several processes that a launcher started share the images, and
    every one of them must call this.

    Args:
        dense: as in `profile`.
        options: batch_size (32), workers, device, dtype, as in `sparsify.processes.Compute`, and backend and
            kernel_precision (the model's own without); say and progress, which is called with images done and in all
            (None: unknown); strict, name, backbone_changed: see `sparsify.measure.evaluate.evaluate_images`.

    Raises:
        SparsifyError: see `sparsify.measure.evaluate.evaluate_images` and `sparsify.models.original.load_original`.
    """
    sparse, beside, changed = _opened(model, dense)
    own = _evaluation.own_compute(sparse)
    names = ("batch_size", "dtype", "device", "backend", "kernel_precision", "workers")
    options, compute = _compute({"backbone_changed": changed} | options, own, *names)
    listener = Listener(options.pop("say", Listener().say))
    if progress := options.pop("progress", None):
        listener = replace(listener, progress=lambda step, done, total: progress(done, total))
    return _evaluation.evaluate_images(sparse, str(images), dense=beside, compute=compute, listener=listener, **options)


def _compute(options: dict[str, Any], compute: Compute, *names: str) -> tuple[dict[str, Any], Compute]:
    """Options that are not among `names`; and `compute` with those that are. A dtype may be a name or torch's own."""
    given = {name: options[name] for name in names if options.get(name) is not None}
    for name in {"device", "dtype"} & given.keys():
        given[name] = str(given[name]).removeprefix("torch.")
    return {name: value for name, value in options.items() if name not in names}, replace(compute, **given)


def _opened(
    model: nn.Module | str | Path, dense: nn.Module | str | Path | None
) -> tuple[nn.Module, nn.Module | None, bool]:
    """The sparse model, the dense one that was given, and whether the backbone is known to have changed."""
    if isinstance(model, nn.Module):
        if dense is not None and not isinstance(dense, nn.Module):
            raise UsageError(f"dense {dense}: beside a model that is no file, the dense model itself is expected")
        return model, dense, False
    file = hub.local(model)
    header = checkpoint.read_header(file)
    if dense is not None and not isinstance(dense, nn.Module):
        dense = original.load_original(header, dense)
    return checkpoint.load(file), dense, header.backbone_changed
