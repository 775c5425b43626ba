"""A dense model in, a sparse one out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Unpack

from sparsify import config
from sparsify.api.arguments import in_python, preprocessing
from sparsify.jobs.convert import Conversion, ImageSources, OutputOptions
from sparsify.jobs.convert import convert as convert_job
from sparsify.jobs.dense import DenseRequest
from sparsify.keywords import ConvertOptions
from sparsify.processes import Compute, Listener
from sparsify.recipe import Recipe, default_recipe, load_recipe


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
        preprocessing(options),
        options.pop("allow_nonfinite", False),
    )
    written = OutputOptions(Path(output), force, options.pop("resume", False))
    compute, listener = Compute(device=options.pop("device", "cpu")), Listener(in_python(options.pop("say", None)))
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
