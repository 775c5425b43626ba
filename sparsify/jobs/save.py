"""A model that `load` returned and a training loop changed: back into a file that `load` reads."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from sparsify.config import SparsityConfig, plainest
from sparsify.errors import UsageError, one_line
from sparsify.files.destinations import check_file
from sparsify.measure.profile import profile
from sparsify.models import building, checkpoint
from sparsify.models.names import Source
from sparsify.nn import attention, execution, hosts, schedules
from sparsify.nn.adaptive import Adaptive
from sparsify.nn.attention import Execution
from sparsify.version import __version__

Header = checkpoint.Header
PREDICTOR = ".attn.predictor."  # in the names of its tensors


def save(model: nn.Module, path: Path, like: Path, force: bool = False) -> Header:
    """Writes `model` to `path`, with the header of `like` and what has changed since.

    Number of classes, image size, pooling and preprocessing (`pretrained_cfg`) are the model's own. Written is a model
    rebuilt from the new header with the weights of `model`; it must compute what `model` computes.

    Args:
        model: sparse; wrappers (DistributedDataParallel, ModelEmaV3, torch.compile) are removed. It is not changed.
        like: the file that `model` was loaded from.
        force: overwrite a file that holds another model.

    Returns:
        The new header: `backbone_changed` unless every tensor outside the predictors is that of `like`.

    Raises:
        UsageError: a model that is not sparse, or that a file cannot describe (other modules than those of `like`).
        BadFile: `like` cannot be read, `path` cannot be written or holds another model.
    """
    check_file(path)
    host = unwrap_model(model)
    if isinstance(host, Adaptive):
        raise UsageError("an adaptive model is two schedules of a file: save what load gives without adaptive")
    if not isinstance(host, nn.Module) or not attention.attention_modules(host):
        raise UsageError("no sparse attention in this model: save takes a model that sparsify.load gave")
    header = checkpoint.read_header(like)
    state = _plain(host)
    described = _described(host, header)
    try:
        fresh = checkpoint.rebuild(described)
        fresh.load_state_dict(state)
    except Exception as error:
        raise UsageError(f"this model cannot be described in a file like {like}: {one_line(error)}") from None
    if not _same_outputs(host, fresh):
        raise UsageError(
            f"rebuilt from {like} this model gives other outputs: its modules were changed in a way that a file cannot say"
        )
    described = described._replace(provenance=_provenance(header, like, state, described))
    if described.backbone_changed:  # other weights are sure of other images
        described = described._replace(sureness={})
    if described.architecture["model_args"] != header.architecture["model_args"]:
        described = _counted(fresh, described)
    checkpoint.may_overwrite(path, described.architecture, force)
    checkpoint.save(fresh, path, described)
    return described


def _plain(host: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, floating-point tensors as float32."""
    state = {}
    for name, tensor in host.state_dict().items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise UsageError(f"{name} is a {type(tensor).__name__}: save the model before it is quantised or sharded")
        t = tensor.detach().cpu()
        state[name] = t.float() if t.is_floating_point() else t
    return state


def _described(host: nn.Module, header: Header) -> Header:
    """`header` with the architecture and cells that `host` has now."""
    architecture, args = header.architecture["architecture"], dict(header.architecture["model_args"])
    before = checkpoint.rebuild(header)
    model = cast(Any, host)
    if getattr(model, "global_pool", None) != getattr(before, "global_pool", None):
        args["global_pool"] = model.global_pool
        if hasattr(model, "fc_norm"):  # timm places the last norm by the pooling: here it stays where it was
            args["fc_norm"] = not isinstance(model.fc_norm, nn.Identity)
    described = building.describe(host, Source(architecture, architecture, architecture, args))
    config = described["pretrained_cfg"]
    if model.num_classes != cast(Any, before).num_classes:
        for name in ("label_names", "label_descriptions", "label_offset"):
            config.pop(name, None)
    size = described["model_args"]["img_size"]
    config.update(num_classes=model.num_classes, input_size=[3, *size])
    header, several = header._replace(architecture=described), schedules.offered(host)
    if several is None:
        return header._replace(config=_config(host, header.config))
    grown = {b: each._replace(config=several.at(b)) for b, each in header.schedules.items()}
    header = header.at(several.budget)
    return header._replace(config=several.at(several.budget), schedules=grown)


def _counted(model: nn.Module, header: Header) -> Header:
    """`header` with the MACs of `model` by each of its schedules."""

    def report(config: SparsityConfig, before: dict[str, Any]) -> dict[str, Any]:
        figures = profile(schedules.applied(model, config), measure=False).as_dict()
        return {k: v for k, v in figures.items() if k in before}

    several = {b: each._replace(report=report(*each)) for b, each in header.schedules.items()}
    return header._replace(report=report(header.config, header.report), schedules=several)


def _config(host: nn.Module, config: SparsityConfig) -> SparsityConfig:
    """The configuration with the cells of the modules, which grow with the image (`graft.resize`)."""
    modules = list(attention.attention_modules(host).values())
    known = config.with_cells(hosts.num_tokens(host))
    own = [getattr(m, "sparsity", None) for m in modules]
    cells = [known.cells_of(i) if s is None else s.cells for i, s in enumerate(own)]
    if cells == [known.cells_of(i) for i in range(len(modules))]:
        return config
    return config.model_copy(update={"cells": plainest([each[0] if len(each) == 1 else each for each in cells])})


@torch.inference_mode()
def _same_outputs(host: nn.Module, fresh: nn.Module) -> bool:
    """Whether both give the same outputs for random images, on the CPU, in float32, eval mode, sparse."""
    twin = copy.deepcopy(host).to("cpu", torch.float32).eval()
    height, width = cast(Any, host).patch_embed.img_size
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    for model in (twin, fresh):
        execution.set_execution(model, Execution())
    own, other = twin(x).nan_to_num(), fresh(x).nan_to_num()  # a model that diverged can be saved too
    return torch.allclose(own, other, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


def _provenance(header: Header, like: Path, state: dict[str, Tensor], described: Header) -> dict[str, Any]:
    """That of `header`, with a note of what happened since; nothing about the machine."""
    with checkpoint.reading(like) as file:
        names = {name for name in file.entries if PREDICTOR not in name}
        outside = {name for name in state if PREDICTOR not in name}
        same = names == outside and all(torch.equal(file.read(name), state[name]) for name in names)
        digest = file.metadata["sparsify.sha256"]
    versions = {"sparsify-vit": __version__, "torch": torch.__version__.partition("+")[0], "timm": timm.__version__}
    further = {
        "of": digest,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "architecture_changed": described.architecture["model_args"] != header.architecture["model_args"],
    }
    history = header.provenance.get("further") or []
    return header.provenance | {"backbone_changed": header.backbone_changed or not same, "further": [*history, further]}
