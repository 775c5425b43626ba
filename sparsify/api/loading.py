"""A file to a model, and back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sparsify import processes
from sparsify.errors import UsageError
from sparsify.jobs.save import save as save_job
from sparsify.models import checkpoint, hub
from sparsify.nn import graft, guard
from sparsify.nn.adaptive import adaptive as adaptively


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
