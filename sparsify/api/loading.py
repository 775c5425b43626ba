"""A file to a model, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sparsify import processes
from sparsify.errors import UsageError
from sparsify.jobs.save import save as save_job
from sparsify.models import checkpoint, hub
from sparsify.nn import cuda_graphs, graft, guard
from sparsify.nn.adaptive import adaptive as adaptively
from sparsify.nn.warmup import warm_up


def load(
    path: str | Path,
    img_size: int | None = None,
    device: str | torch.device = "cpu",
    *,
    budget: float | None = None,
    adaptive: float | None = None,
    backend: str = "auto",
    kernel_precision: str = "input",
    warmup: Sequence[tuple[int, int, int, int]] = (),
    graph: bool = False,
    **rates: float,
) -> nn.Module:
    """Load the sparse model of a file or of a hub's repository, in eval mode, for inference or further training.

    For inference call it under `torch.inference_mode()` or `no_grad()`. Outside of these the slower training path runs:
    always sparse attention, and without kernels the differentiable reference. Predictors take no gradients: a
    choice of keys has none (`convert --data` trains them).

    Example:
        model = sparsify.load("model.safetensors", warmup=[(1, 3, 224, 224), (8, 3, 224, 224)])

    Args:
        path: file; `hf-hub:ORG/NAME` or ORG/NAME of a repository that `sparsify push` wrote (@REVISION may follow),
            downloaded once; or `local-dir:FOLDER`.
        img_size: side in pixels, when it is not the file's; position embeddings and predictors are resampled.
        device: of torch: cpu, cuda, cuda:1, mps.
        budget: of a file made for several targets, which of them; None: the first; 1: dense attention over all tokens. A
            model of a file that was made for a target has `set_budget`, to change it between calls.
        adaptive: mean cost of an image, a fraction of the dense model's: an `Adaptive` classifier that runs a cheap
            schedule, and a costlier one again where that is unsure (`sparsify.nn.adaptive`); its `rule` says which.
        backend: cpu or reference computes the sparse form always. auto: per attention shape whatever was measured fastest
            on this machine (about 0.3 s at the first call of a shape, then remembered on disk): the CPU kernels, or
            dense attention, unless the file's backbone was changed. From the first `model.train()` on, always sparse, in
            this model and its copies.
        kernel_precision: input, or bf16: queries, keys and values of float32 models are stored in bfloat16 by the kernels.
        warmup: shapes (B, 3, H, W) of the calls to come. The model runs once for each, and for each budget of the file:
            kernels are built and `auto` measures now, so that the first such call does not wait. An adaptive model's
            second schedule runs for 1 to B images. It holds for the number of threads (`torch.set_num_threads`) and the
            dtype that the model has then.
        graph: on a CUDA device, replay CUDA graphs, captured at the first call of each shape, budget and dtype: at small
            batches a GPU otherwise waits for Python. Under `inference_mode` or `no_grad`, for calls of the model itself; the
            dense model stands in for a shape where its graph is faster, unless the file's backbone was changed. The result
            wraps the model (`module`) and is for inference alone (`sparsify.nn.cuda_graphs.Graphed`).
        rates: drop_rate, pos_drop_rate, proj_drop_rate, drop_path_rate of training, as timm's (0 to 1).

    Returns:
        A timm model, float32, on `device`.

    Raises:
        BadFile: a file that is missing, damaged, from a newer version, or that `convert` did not write.
        UsageError: an unknown backend, precision or rate, a budget or a mean cost that the file does not have, a shape that
            the model does not take, backend cpu where the kernels cannot be used, or graph on another device than CUDA's or
            with adaptive.
        SparsifyError: a download that failed.
    """
    file = hub.local(path)
    if budget is not None and adaptive is not None:
        raise UsageError("give either budget, one schedule, or adaptive, two of them")
    target = processes.torch_device(device)
    if graph:
        cuda_graphs.check(target)
        if adaptive is not None:
            raise UsageError("graph replays one schedule: an adaptive model waits for the logits of its first")
    loaded = checkpoint.read(file, img_size, rates, budget)
    rule = None if adaptive is None else loaded.header.rule(adaptive)
    model = graft.freeze_predictors(loaded.model.to(target))
    own = not loaded.header.backbone_changed
    guard.set_backend(model, backend, kernel_precision, dense_allowed=own, graph=graph)
    loaded_model = model if rule is None else adaptively(model, rule)
    if graph:
        loaded_model = cuda_graphs.Graphed(model, dense_allowed=own and backend == "auto")
    warm_up(loaded_model, warmup)
    return loaded_model


def save(model: nn.Module, path: str | Path, *, like: str | Path, force: bool = False) -> Path:
    """Write a model that `load` gave and that was trained further to a file that `load` reads.

    Args:
        model: weights, number of classes, pooling and image size may have changed; other modules may not. Wrappers
            (DistributedDataParallel, timm's ModelEmaV3, torch.compile) are taken off.
        path: file to write.
        like: what `load` was given: the settings and the provenance are taken from there. The new file says that its
            backbone was changed, if it was.
        force: overwrite a file that holds another model.

    Returns:
        `path`.

    Raises:
        SparsifyError: a model that is not sparse, or that a file cannot describe (other modules than those of `like`); a
            file that cannot be read or written, or that holds another model. Nothing is written then.
    """
    save_job(model, Path(path), hub.local(like), force)
    return Path(path)
