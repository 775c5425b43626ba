"""The library in four functions; `import sparsify` shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify import checkpoint
from sparsify import conversion as _conversion
from sparsify import evaluation as _evaluation
from sparsify import profiling as _profiling
from sparsify.config import Target, validate
from sparsify.errors import UsageError
from sparsify.metrics import Evaluation
from sparsify.nn import graft
from sparsify.ops.auto import Chooser
from sparsify.ops.spec import Execution
from sparsify.recipe import Recipe, load_recipe


def convert(
    name: str,
    *,
    keep: float | str | Sequence[float | str] | None = None,
    target_macs: float | None = None,
    target_latency: float | None = None,
    recipe: str | Recipe = "calibrate",
    output: str | Path = "model.safetensors",
    weights: str | Path | None = None,
    data: str | Path | None = None,
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
        recipe: name, YAML file or `Recipe`.
        weights: local checkpoint (.safetensors, .pth) of that architecture.
        data: folder or data set to calibrate on; labels are not used. None: the built-in pictures.
        changes: fields of `SparsityConfig` or `Recipe` (tokens, predictor, rank, tail, cells, seed, calib_images, ...);
            tokens is a mapping: {"keep": 0.7, "stages": (4, 7, 10), "way": "merge"}.

    Raises:
        SparsifyError: one line: what was wrong, what was expected, what to do.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = chosen.override(
        keep=keep if keep is None or isinstance(keep, float | int | str) else tuple(keep), **changes
    )
    target = None
    if target_macs is not None or target_latency is not None:
        if keep is not None:
            raise UsageError("keep and a target: the search chooses keep; leave one of them out")
        target = validate(Target, {"macs": target_macs, "latency": target_latency}, "argument target")
    return _conversion.convert(
        name, chosen, Path(output), weights=None if weights is None else Path(weights), num_classes=num_classes,
        img_size=img_size, images=None if data is None else str(data), force=force, device=device, target=target,
        say=say,
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


def profile(model: nn.Module | str | Path, **options: Any) -> _profiling.Profile:
    """MACs and latency of a sparse model (or its file) beside its dense original; see `sparsify.profiling.profile`."""
    if not isinstance(model, nn.Module):
        changed = checkpoint.read_header(Path(model)).backbone_changed
        model, options = checkpoint.load(model), {"backbone_changed": changed} | options
    return _profiling.profile(model, **options)


def evaluate(model: nn.Module | str | Path, images: str | Path, **options: Any) -> Evaluation:
    """Accuracy of a sparse model beside its dense original on a labelled folder, timm data set or `digits`.

    The sparse form is computed, whatever `load` chose. See `sparsify.evaluation.evaluate_images` for the options
    (batch_size, workers, device, dtype, strict, backend, kernel_precision).
    """
    sparse = model if isinstance(model, nn.Module) else checkpoint.load(model)
    return _evaluation.evaluate_images(sparse, str(images), **options)
