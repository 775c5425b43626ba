"""A dense model that the caller holds, `nn.Module`: checked, copied, and described so that timm can build it again."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from typing import Any, cast

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from sparsify.errors import BadFile, SparsifyError, UnsupportedModel, UsageError, field, one_line
from sparsify.models import building
from sparsify.models.digits import network
from sparsify.models.names import Source
from sparsify.nn import hosts
from sparsify.nn.adaptive import Adaptive
from sparsify.nn.attention import attention_modules

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_NOT_ITS_WEIGHTS = ("license", "tag")  # of timm's weights: whose weights the caller's model has, nobody knows
_ATTRIBUTES = {"class_token": "has_class_token", "reg_tokens": "num_reg_tokens"}  # of timm's arguments with other names


def copied(module: nn.Module) -> tuple[Source, nn.Module]:
    """What the model is, and a copy: float32, eval mode, on its device, without hooks. The given one is not changed.

    Wrappers (DistributedDataParallel, ModelEmaV3, torch.compile) are left behind.

    Raises:
        UnsupportedModel: no ViT of timm that can be converted; the message names its class.
        UsageError: it is sparse already, lies on several devices, or its attention has weights of another form than
            plain tensors (pruned, quantised, adapted).
    """
    host = unwrap_model(module)
    name = type(host).__name__
    if type(host).__module__.startswith("transformers."):
        how = "give the folder that its save_pretrained writes, or its name on the hub"
        raise UnsupportedModel(f"this {name} is a model of Hugging Face transformers: {how}")
    if isinstance(host, Adaptive) or attention_modules(host):
        raise UsageError(f"this {name} is sparse already: give the dense model that it was made from")
    for attention in hosts.supported_attentions(host).values():
        _check_plain(attention, name)
    if len(devices := {str(p.device) for p in host.parameters()}) > 1:
        raise UsageError(f"this {name} is on {', '.join(sorted(devices))}: move it to one device first")
    # a hook would see the calibration, and what it refers to may be impossible to copy
    without: dict[int, Any] = {id(vars(m)[hooks]): OrderedDict() for m in host.modules() for hooks in _HOOKS}
    model = copy.deepcopy(host, memo=without).float().eval()
    config = getattr(host, "pretrained_cfg", None) or {}
    config = dict(config if isinstance(config, dict) else config.to_dict())
    config = {"input_size": (3, 224, 224)} | {k: v for k, v in config.items() if k not in _NOT_ITS_WEIGHTS}
    cast(Any, model).pretrained_cfg = config
    return _source(building.with_true_config(model)), model


def check_described(model: nn.Module, source: Source, described: dict[str, Any]) -> None:
    """Raise `UsageError` where timm does not build this very model from what `building.describe` says of it."""
    name, memory = type(model).__name__, f"leave {field('output')} out to get the model without a file"
    if not source.architecture:
        unknown = "it does not say which architecture of timm it is (pretrained_cfg)"
        raise UsageError(f"this {name} cannot be written to a file: {unknown}; {memory}")
    wrong = f"this {name} cannot be written to a file: it is not what timm builds as {source.architecture}"
    state = {key: t.detach().cpu() for key, t in model.state_dict().items()}
    try:
        with torch.device("meta"):
            frame = building.described(**described)
        expected = frame.state_dict()
    except (BadFile, UnsupportedModel, UsageError) as error:
        raise UsageError(f"{wrong} ({one_line(error)}); {memory}") from None
    for key in sorted(state.keys() | expected.keys()):
        own, other = (tuple(t[key].shape) if key in t else None for t in (state, expected))
        if own != other:
            has = f"{key} is {own or 'missing'}, there it is {other or 'missing'}"
            raise UsageError(f"{wrong} ({has}); {memory}")
    twin = building.materialise(lambda: building.described(**described), frame).eval()
    twin.load_state_dict(state)
    if not _alike(model, twin):
        raise UsageError(f"{wrong}: with the same weights its outputs differ; {memory}")


@torch.inference_mode()
def _alike(model: nn.Module, twin: nn.Module) -> bool:
    """Whether both give the same outputs for a random image."""
    x = torch.randn(1, 3, *hosts.image_size(model), generator=torch.Generator().manual_seed(0))
    own = model(x.to(next(model.parameters()).device)).cpu().nan_to_num()
    other = twin(x).nan_to_num()
    return own.shape == other.shape and torch.allclose(own, other, rtol=1e-3, atol=1e-3 * float(own.abs().max()))


def _check_plain(attention: nn.Module, name: str) -> None:
    """Raise `UsageError` where a module inside of an attention is none of torch's or timm's, or its weights are special."""
    for key, module in attention.named_modules():
        what = type(module).__module__
        if not what.startswith(("torch.nn.modules.", "timm.")):
            kind = f"{what}.{type(module).__name__}"
            raise UsageError(f"this {name} has a {kind} in its attention ({key}): merge or remove it first")
        tensors = [*module._parameters.values(), *module._buffers.values()]
        plain = all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors)
        if not plain or (isinstance(module, nn.Linear) and module._parameters.get("weight") is None):
            raise UsageError(
                f"this {name} has weights that are no plain tensors in its attention ({key}): convert it before it is "
                "quantised, and after pruning or weight norm were made permanent"
            )


def _source(model: nn.Module) -> Source:
    """What timm would have to be asked for to build `model`: as far as its attributes say."""
    host = cast(Any, model)
    architecture = str(host.pretrained_cfg.get("architecture") or "")
    asked = architecture or type(model).__name__
    digits = architecture == network.ARCHITECTURE
    plain = Source(asked, architecture, architecture, dict(network.MODEL_ARGS) if digits else {})
    try:
        building.check_name(architecture)
        frame = cast(Any, building.skeleton(plain))
    except SparsifyError:
        return Source(asked, "", "")
    args = dict(plain.model_args)
    for name in inspect.signature(type(model).__init__).parameters:
        attribute = _ATTRIBUTES.get(name, name)
        value = getattr(host, attribute, None)
        if isinstance(value, bool | int | float | str) and value != getattr(frame, attribute, value):
            args[name] = value
    if len(host.blocks) != len(frame.blocks):
        args["depth"] = len(host.blocks)
    if "global_pool" in args and hasattr(host, "fc_norm"):  # timm places the last norm by the pooling, once
        args["fc_norm"] = not isinstance(host.fc_norm, nn.Identity)
    return Source(asked, architecture, architecture, args)
