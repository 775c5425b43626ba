"""The built-in `digits` model: a small timm ViT with 197 tokens and its data set, so that the tool runs offline.

The network is a plain `timm.models.vision_transformer.VisionTransformer`: 14 x 14 patches + 1 class token, 4 blocks,
2 heads of size 64.  The data are the 1,797 scans of 8 x 8 pixels that scikit-learn ships (see NOTICE.md, CC BY 4.0).
`benchmarks/train_digits.py` in the source tree rebuilds both `.safetensors` files of this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from timm.models.vision_transformer import VisionTransformer


ARCHITECTURE = "vit_digits_patch2_28"
DATA_FILE = "data.safetensors"
WEIGHTS_FILE = "weights.safetensors"
SPLITS = ("train", "test")  # the index of a name is its code in the data file

# Keyword arguments of timm's VisionTransformer; with timm's own defaults for the rest.
MODEL_ARGS: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 2,
    "in_chans": 3,
    "num_classes": 10,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 2,
    "mlp_ratio": 4.0,
}

# What timm calls a pretrained_cfg: `timm.data.resolve_model_data_config` reads the preprocessing from it.
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


def _read(name: str, folder: Path | None) -> bytes:
    """Bytes of the file `name` in `folder`, or in this package if `folder` is None."""
    return (resources.files(__name__) if folder is None else folder).joinpath(name).read_bytes()


class Digits:
    """Map-style data set of (image, label): a PIL RGB image of 8 x 8 pixels, or `transform(image)`, and an int 0..9.

    The split is part of the data file: 1,200 train and 597 test images, drawn at random within each class.
    """

    classes: tuple[str, ...] = tuple("0123456789")

    def __init__(
        self, split: str = "test", transform: Callable[[Any], Any] | None = None, folder: Path | None = None
    ) -> None:
        """`split`: "train" or "test".  `folder`: where `data.safetensors` lies, this package if None."""
        from safetensors.numpy import load

        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        data = load(_read(DATA_FILE, folder))
        rows = data["split"] == SPLITS.index(split)
        self.split = split
        self.transform = transform
        self.images: np.ndarray = data["images"][rows]  # [N, 8, 8] uint8, 0 (paper) .. 16 (ink)
        self.labels: np.ndarray = data["labels"][rows]  # [N] uint8, 0..9

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        scan = self.images[index].astype("uint16")  # [8, 8]
        image = Image.fromarray((scan * 255 // 16).astype("uint8")).convert("RGB")
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


def dataset(split: str = "test", transform: Callable[[Any], Any] | None = None, folder: Path | None = None) -> Digits:
    """The data set of one split, "train" or "test"; see `Digits`."""
    return Digits(split, transform, folder)


def build(pretrained: bool = True, folder: Path | None = None) -> VisionTransformer:
    """The model on the CPU, float32, in eval mode: images [B, 3, 28, 28] to logits [B, 10].

    `pretrained` loads the weights (stored as float16); without it they are timm's random initial ones.
    `folder`: where `weights.safetensors` lies, this package if None.
    """
    from safetensors.torch import load
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**MODEL_ARGS)
    if pretrained:
        model.load_state_dict(load(_read(WEIGHTS_FILE, folder)))  # strict; copies float16 into float32
    model.pretrained_cfg = model.default_cfg = dict(DATA_CONFIG)  # type: ignore[assignment]
    return model.eval()
