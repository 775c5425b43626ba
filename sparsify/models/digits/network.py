"""The `digits` network: a plain timm `VisionTransformer` with 14 x 14 patches + 1 class token, 4 blocks, 2 heads of size 64.

`benchmarks/train_digits.py` in the source tree trains it on `sparsify.images.digits` and writes its weights.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from safetensors.torch import load
from timm.models.vision_transformer import VisionTransformer

ARCHITECTURE = "vit_digits_patch2_28"
WEIGHTS_FILE = "weights.safetensors"

# Arguments of timm's VisionTransformer that differ from its defaults.
MODEL_ARGS: dict[str, Any] = {"img_size": 28, "patch_size": 2, "in_chans": 3, "num_classes": 10}
MODEL_ARGS |= {"embed_dim": 128, "depth": 4, "num_heads": 2, "mlp_ratio": 4.0}

# The model's `pretrained_cfg`: `timm.data.resolve_model_data_config` reads the preprocessing from it.
DATA_CONFIG: dict[str, Any] = {
    "architecture": ARCHITECTURE,
    "num_classes": 10,
    "input_size": (3, 28, 28),
    "fixed_input_size": True,
    "pool_size": None,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "CC-BY-4.0",
}


def build(pretrained: bool = True, folder: Path | None = None) -> VisionTransformer:
    """The model on the CPU, float32, in eval mode: images [B, 3, 28, 28] to logits [B, 10].

    `pretrained` loads the weights (stored as float16) from `folder` (None: this package) in place of timm's random ones.
    """
    model = VisionTransformer(**MODEL_ARGS)
    if pretrained:
        home = resources.files("sparsify.models.digits") if folder is None else folder
        weights = home.joinpath(WEIGHTS_FILE).read_bytes()
        model.load_state_dict(load(weights))  # strict; copies float16 into float32
    model.pretrained_cfg = model.default_cfg = dict(DATA_CONFIG)  # type: ignore[assignment]
    return model.eval()
