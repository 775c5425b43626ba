"""Features of a real ViT-S/14, sparse beside dense, and what its conversion takes: `make bench-features`.

    python benchmarks/features.py [--sizes 224,518] [--images 64] [--spread all,rank] [--calib-images 128]

Reads vit_small_patch14_saliency.safetensors and photographs from SPARSIFY_TEST_DATA (see accuracy.py); it has DINOv2's
architecture and no classifier. Calibration sees photographs of `imagenet-sample/train`; features are compared on others.
The conversion's time is that of the whole job, reading the pictures included; memory is the largest of the process.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import torch
from accuracy import DATA
from harness import Report, Row, conditions, options, start
from torch import nn

import sparsify
from sparsify.images import datasets
from sparsify.images.trainset import trainset
from sparsify.measure.profile import profile
from sparsify.nn import graft
from sparsify.recipe import load_recipe

WEIGHTS = DATA / "vit_small_patch14_saliency.safetensors"


def compared(model: nn.Module, images: int, batch: int) -> Row:
    """Patch tokens of `forward_features` beside the dense model's: cosines by image, and the relative squared error."""
    dense, prefix = graft.dense_twin(model), int(model.num_prefix_tokens)  # type: ignore[arg-type]
    transform = datasets.transform(datasets.data_config(model))
    shown = trainset(DATA / "imagen-5perclass").calibration(images, 0, transform, batch)
    cosines, off, whole = [], 0.0, 0.0
    with torch.inference_mode():
        for x in shown:
            right, found = (m.forward_features(x)[:, prefix:] for m in (dense, model))  # (B, n, C)
            cosines.append(torch.cosine_similarity(found, right, dim=-1).mean(1))  # (B)
            off, whole = off + float((found - right).square().sum()), whole + float(right.square().sum())
    each = torch.cat(cosines)
    return {"images": len(each), "cosine, mean": f"{each.mean():.4f}", "worst image": f"{each.min():.4f}",
            "relative squared error": off / whole}  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sizes", default="224,518", help="pixels")
    parser.add_argument("--spread", default="all,rank", help="what is spent over the heads")
    parser.add_argument("--images", type=int, default=64, help="photographs to compare features on")
    parser.add_argument("--calib-images", type=int, default=128, help="photographs to calibrate on")
    parser.add_argument("--keep", type=float, default=0.1)
    arguments = parser.parse_args()
    start(arguments)
    if not WEIGHTS.exists():
        raise SystemExit(f"no weights and photographs at {DATA} (set SPARSIFY_TEST_DATA)")
    tables, rows = Report("Features of a ViT-S/14", conditions(arguments, keep=arguments.keep)), []
    for size in map(int, arguments.sizes.split(",")):
        for spread in arguments.spread.split(","):
            recipe = load_recipe("calibrate").override(keep=arguments.keep, spread=spread)
            recipe = recipe.override(calib_images=arguments.calib_images)
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                made = sparsify.convert(
                    "vit_small_patch14_dinov2", recipe=recipe, weights=WEIGHTS, img_size=size,
                    data=DATA / "imagenet-sample" / "train", output=Path(folder) / "m.safetensors",
                )  # fmt: skip
            seconds, p = time.perf_counter() - begin, profile(made.model, measure=False)
            rows.append({
                "pixels": size, "spread": spread, "MHSA": f"{100 * (p.mhsa_macs_sparse / p.mhsa_macs_dense - 1):+.1f} %",
                **compared(made.model, arguments.images, 8 if size < 400 else 2), "conversion, s": seconds,
                "memory, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            })  # fmt: skip
            print(rows[-1], flush=True)
    tables.add("ViT-S/14 (saliency)", rows, "Patch tokens of forward_features against the dense model's own.")
    tables.write(arguments.markdown, arguments.json)


if __name__ == "__main__":
    main()
