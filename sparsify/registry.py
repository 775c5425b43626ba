"""timm's `create_model` for sparse models: `import sparsify.registry` adds the name `sparsify_vit` to timm's registry.

    import timm, sparsify.registry

    timm.create_model("hf-hub:ORG/NAME", pretrained=True)                     # a repository that `sparsify push` wrote
    timm.create_model("local-dir:FOLDER", pretrained=True)                    # its files in a folder
    timm.create_model("sparsify_vit", pretrained=True, pretrained_cfg_overlay=dict(file="model.safetensors"))

`--model sparsify_vit --pretrained --pretrained-path model.safetensors` of timm's training script makes the last call. The
model always computes the sparse form; for `backend=auto` use `sparsify.load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from timm.models import register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import generate_default_cfgs
from torch import nn

from sparsify.errors import UsageError
from sparsify.models import checkpoint, hub
from sparsify.models.hub import ARCHITECTURE
from sparsify.nn import graft

default_cfgs = generate_default_cfgs({ARCHITECTURE: {}})  # timm looks for this name and warns without it
FEATURES = ("out_indices", "out_map", "return_dict", "output_fmt", "norm")


@register_model
def sparsify_vit(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    global_pool: str | None = None,
    features_only: bool = False,
    device: Any = "cpu",
    dtype: Any = None,
    **more: Any,
) -> nn.Module:
    """The sparse model of a file, a folder or a repository of the hub, as an entry point of timm.

    Args:
        pretrained: must be True: the weights are the model.
        pretrained_cfg, pretrained_cfg_overlay: `file` (a file, or a folder with model.safetensors) or `hf_hub_id`.
        num_classes, global_pool: another number of classes gets a new head, by `reset_classifier`.
        img_size: pixels, square.
        features_only: timm's FeatureGetterNet around it, with `out_indices` (default: the last 3 blocks), `norm`, ...
        more: `checkpoint.RATES`; what timm adds itself is ignored.

    Raises:
        UsageError: nothing to read from, or an argument that cannot be applied.
        SparsifyError: see `sparsify.models.hub.fetch` and `sparsify.models.checkpoint.load`.
    """
    for name in ("pretrained_model_args", "strict_img_size", "dynamic_img_size"):
        more.pop(name, None)
    features = {name: more.pop(name) for name in FEATURES if name in more}
    if features and not features_only:
        raise UsageError(f"{', '.join(features)}: for features_only=True alone")
    if in_chans != 3:
        raise UsageError(f"in_chans {in_chans}: {ARCHITECTURE} takes images of 3 channels")
    rates = checkpoint.checked(more)
    if not pretrained:
        raise UsageError(f"{ARCHITECTURE} is read from a file, which describes it: give pretrained=True")
    file = _file(resolve_pretrained_cfg(ARCHITECTURE, pretrained_cfg, pretrained_cfg_overlay), cache_dir)
    model = cast(Any, graft.freeze_predictors(checkpoint.load(file, _side(img_size), rates=rates)))
    classes = model.num_classes if num_classes is None else num_classes
    if classes != model.num_classes or (global_pool is not None and global_pool != model.global_pool):
        model.reset_classifier(classes, global_pool)
    model = model.to(device=device, dtype=dtype)
    return FeatureGetterNet(model, **{"out_indices": 3, **features}) if features_only else model


def _file(config: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    if config.file:
        path = Path(config.file)
        return path / hub.WEIGHTS if path.is_dir() else path
    if config.hf_hub_id:
        return hub.fetch(config.hf_hub_id, config.hf_hub_filename or hub.WEIGHTS, cache_dir)
    raise UsageError(
        f"{ARCHITECTURE} needs to know where it lies: hf-hub:ORG/NAME or local-dir:FOLDER as the name, or "
        "pretrained_cfg_overlay=dict(file='model.safetensors')"
    )


def _side(img_size: int | tuple[int, int] | None) -> int | None:
    if img_size is None or isinstance(img_size, int):
        return img_size
    height, width = img_size
    if height != width:
        raise UsageError(f"img_size {height}x{width}: a square image is expected")
    return int(height)
