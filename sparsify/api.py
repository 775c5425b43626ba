"""The library in five functions; `import sparsify` shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify import checkpoint, exporting, original
from sparsify import conversion as _conversion
from sparsify import evaluation as _evaluation
from sparsify import profiling as _profiling
from sparsify.config import Target, validate
from sparsify.errors import UsageError
from sparsify.exporting import Exported
from sparsify.metrics import Evaluation
from sparsify.nn import graft
from sparsify.ops.auto import Chooser
from sparsify.ops.spec import Execution
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
            tokens is a mapping: {"keep": 0.7, "stages": (4, 7, 10), "way": "merge"}.

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
) -> nn.Module:
    """The sparse model of a file, eval mode, for inference; see `sparsify.checkpoint.load`.

    Call it under `torch.inference_mode()` or `no_grad()`: where a gradient may be asked for, the slow differentiable
    reference computes.

    Args:
        backend: cpu or reference computes the sparse form always. auto: per attention shape whatever was measured fastest
            on this machine (about 0.3 s at the first call of a shape, then remembered on disk): the CPU kernels, or
            dense attention, unless the file's backbone was changed.
        kernel_precision: input, or bf16: queries, keys and values of float32 models are stored in bfloat16 by the kernels.

    Raises:
        BadFile: see `sparsify.checkpoint.load`.
        UsageError: an unknown backend or precision, or backend cpu where the kernels cannot be used.
    """
    changed = checkpoint.read_header(Path(path)).backbone_changed
    model = checkpoint.load(path, img_size, device)
    fallback = backend == "auto" and not changed
    graft.set_execution(model, Execution(backend, kernel_precision, fallback, Chooser() if fallback else None))
    return model


def export(path: str | Path, format: str = "onnx", output: str | Path | None = None, **options: Any) -> Exported:
    """Write the model of a file as a program that runs without this package, ONNX or torch.export's; docs/export.md.

    Args:
        options: see `sparsify.exporting.export` (batch_size, img_size, force).

    Raises:
        SparsifyError: see `sparsify.exporting.export`.
    """
    return exporting.export(path, format, output, **options)


def profile(
    model: nn.Module | str | Path, *, dense: nn.Module | str | Path | None = None, **options: Any
) -> _profiling.Profile:
    """MACs and latency of a sparse model (or its file) beside its dense original.

    Args:
        dense: the original: a model; with a file also a name or checkpoint, which is checked against the file. None: the
            model's own weights without sparsity, or, for a file whose backbone was changed, no dense figures (None). Of a
            module nobody knows whether its weights were changed: say backbone_changed=True or give `dense`.
        options: see `sparsify.profiling.profile`.

    Raises:
        SparsifyError: see `sparsify.profiling.profile` and `sparsify.original.load_original`.
    """
    sparse, beside, changed = _opened(model, dense)
    return _profiling.profile(sparse, dense=beside, **{"backbone_changed": changed} | options)


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
        options: see `sparsify.evaluation.evaluate_images` (batch_size, workers, device, dtype, strict, backend,
            kernel_precision, backbone_changed).

    Raises:
        SparsifyError: see `sparsify.evaluation.evaluate_images` and `sparsify.original.load_original`.
    """
    sparse, beside, changed = _opened(model, dense)
    return _evaluation.evaluate_images(sparse, str(images), dense=beside, **{"backbone_changed": changed} | options)


def _opened(
    model: nn.Module | str | Path, dense: nn.Module | str | Path | None
) -> tuple[nn.Module, nn.Module | None, bool]:
    """The sparse model, the dense one that was given, and whether the backbone is known to have changed."""
    if isinstance(model, nn.Module):
        if dense is not None and not isinstance(dense, nn.Module):
            raise UsageError(f"dense {dense}: beside a model that is no file, the dense model itself is expected")
        return model, dense, False
    header = checkpoint.read_header(Path(model))
    if dense is not None and not isinstance(dense, nn.Module):
        dense = original.load_original(header, dense)
    return checkpoint.load(model), dense, header.backbone_changed
