"""A dense model in, a sparse one out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from torch import nn

from sparsify import config
from sparsify.api.arguments import Images, dense_request, device_of, given_images, listening, split
from sparsify.jobs.convert import Conversion, ImageSources, OutputOptions
from sparsify.jobs.convert import convert as convert_job
from sparsify.keywords import ConvertOptions
from sparsify.nn import graft, guard
from sparsify.processes import Compute
from sparsify.recipe import Recipe, default_recipe, load_recipe

MODEL_FILE = "model.safetensors"


def convert(
    model: str | Path | nn.Module,
    data: Images | None = None,
    *,
    keep: float | str | Sequence[float | str] | None = None,
    recipe: str | Recipe | None = None,
    weights: str | Path | None = None,
    output: str | Path | None = None,
    force: bool = False,
    **options: Unpack[ConvertOptions],
) -> Conversion:
    """Convert a timm model, by its name or as a module, to a sparse one.

    A module is not changed: a copy is converted, without the module's hooks. `Conversion.model` is then in eval mode, on the
    module's device and in its dtype, and computes as a model of `load` does (backend auto).

    Example:
        sparse = sparsify.convert(timm_model, loader, keep=0.1).model
        sparsify.convert("deit_small", keep=0.1)  # writes model.safetensors

    Args:
        model: a ViT of timm (`nn.Module`); or a name: alias, timm name, ORG/NAME of the Hub (timm's or
            transformers' form), a model's folder, or `digits`.
        data: images to calibrate on. A folder or data set (text or path), which is read through the model's own
            preprocessing, and which a recipe also learns from. Or tensors that are normalised already, of which the first
            `calib_images` are read once and calibrated on: [B, 3, H, W]; or a DataLoader or another iterable of such
            tensors, of (images, labels), or of dicts with one such tensor. None: the built-in pictures.
        keep: fraction of keys that each query attends to, 0 < keep <= 1, or 'dense'; one value, or one for each block.
            With a target: the values to choose from for each block.
        recipe: name, YAML file or `Recipe`. None: `distill` where a file is written, `data` is a folder or data set, and at
            most one target is given; else `calibrate`.
        weights: of a name: local checkpoint (.safetensors, .pth) of that architecture.
        output: file to write; its reports go beside it. None: model.safetensors for a name, no file for a module.
        force: overwrite a file that holds another model.

    Keyword Args:
        target_macs: fraction of the dense model's MACs to choose keep and tokens of every block for. Several fractions: a
            schedule for each over one backbone, the first in use (`model.set_budget`); nothing is trained then.
        target_latency: the same for fractions of the dense model's time on this machine. Give one of the two.
        runtime: where the model is to run: eager, compile, onnxruntime or openvino. For the last two a target is reached by
            fewer tokens alone, with dense attention: sparse attention is slower there.
        allow_nonfinite: take weights with NaN or infinity, which are refused otherwise.
        calibrate_only: leave out the stages of the recipe.
        val: labelled images that decide which weights are written; None: a part of `data` is held back.
        resume: continue the interrupted fine-tuning of this output (folder STEM.run beside it).
        num_classes: outputs of `weights`, 0 for features; None: read off the file.
        img_size: of a name: side in pixels; None: the model's.
        ema: of `weights`, take the averaged ones (EMA), or the others; None: averaged where the file has them.
        device: of torch: cpu, cuda, cuda:1, mps. None: the module's, or cpu for a name.
        dtype: of the calibration's forward passes (autocast): float32, bfloat16 or float16. Files are float32.
        batch_size: images computed together in calibration; None: 16.
        micro_batch: maximum images per forward/backward pass of a fine-tuning (gradient accumulation); 64.
        workers: processes that read images of a folder or data set; 0: this one.
        backend: what computes sparse attention in the calibration's trials: auto, cpu or reference.
        say: called with a line now and then.
        progress: True shows bars in a notebook or at a terminal (lines elsewhere); a function is called with the name of a
            step, images or steps done, and their total (None: unknown).
        mean: of the preprocessing, subtracted from pixels from 0 to 1; written into the file, as the next four.
        std: divides them then.
        crop_pct: side of the central crop, as a fraction of the shorter side.
        interpolation: of resizing: bicubic, bilinear, nearest, box, hamming or lanczos.
        class_map: file of the names of all classes in their order, .txt or .json.
        predictor: head-lowrank, or token-lowrank, the paper's. This and what follows: fields of
            `sparsify.SparsityConfig` and of `sparsify.recipe.Recipe`.
        rank: coordinates of the predictor; one value, or one for each block.
        tail: what represents the dropped keys: none, mean, cells or clusters.
        cells: grid of cells of the tail, (rows, columns).
        spread: what is spent unevenly over the heads: all, rank or none.
        granularity: token, or tile: one set of keys for neighbouring queries.
        tile: rows and columns of a tile.
        fold: fold the predictor into `qkv` where that is exact.
        token_lowrank: knobs of the paper's predictor, a mapping.
        tokens: removal of tokens, a mapping:
            {"keep": 0.7, "stages": (4, 7, 10), "way": "merge", "importance": "fitted"}.
        description: of the recipe.
        calib_images: images to calibrate on, at most.
        seed: of the choice of images.
        start: of the predictors: closed-form or random.
        precision: of the fine-tuning: auto, float32, bfloat16 or float16.
        hold_back: fraction of the images that decides which weights are kept.
        repair: least squares before the stages, a mapping.
        stages: of the fine-tuning.

    Returns:
        The sparse model with its header, theoretical MACs and the paths of what was written (None: nothing was).

    Raises:
        UnsupportedModel: a module that is no ViT of timm, or one that cannot be converted; the message names its class.
        SparsifyError: one line: what was wrong, what was expected, what to do. Nothing is written then.
    """
    calibrate_only, val = options.pop("calibrate_only", False), options.pop("val", None)
    say, progress = options.pop("say", None), options.pop("progress", False)
    request = dense_request(model, weights, options)
    path = MODEL_FILE if output is None and request.module is None else output
    written = None if path is None else OutputOptions(Path(path), force, options.pop("resume", False))
    compute, rest = split(Compute(device=device_of(request)), options, ConvertOptions)
    for handled in ("device", "backend"):  # None: the default
        rest.pop(handled, None)
    keeps = tuple(keep) if isinstance(keep, Iterable) and not isinstance(keep, str) else keep
    to_try = None if keep is None else [None if each == "dense" else each for each in config.listed(keeps)]
    target = config.target(
        rest.pop("target_macs", None), rest.pop("target_latency", None), to_try, rest.pop("runtime", "eager")
    )
    if recipe is None:
        may_learn = isinstance(data, str | Path) and written is not None and not calibrate_only
        recipe = default_recipe(may_learn and (target is None or len(target.shares) == 1))
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = chosen.override(keep=None if target else keeps, **rest)
    if calibrate_only:
        chosen = chosen.without_training()
    images = ImageSources(given_images(data), None if val is None else str(val))
    with listening(say, progress) as listener:
        made = convert_job(request, chosen, written, images=images, target=target, compute=compute, listener=listener)
    return made if request.module is None else replace(made, model=_as_given(made, request.module))


def _as_given(made: Conversion, module: nn.Module) -> nn.Module:
    """The converted model as `load` gives one, on the device of the module and in its dtype, if it has one."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    model = graft.freeze_predictors(made.model.to(next(module.parameters()).device))
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    guard.set_backend(model, "auto", dense_allowed=not made.header.backbone_changed)
    return model
