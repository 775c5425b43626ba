"""What the kernels and tiles do to accuracy, on DeiT-Tiny's real weights and 950 photographs: `make bench-kernels-accuracy`.

    python benchmarks/kernel_accuracy.py [--threads 2] [--images 950] [--only kernels|tiles] [--sizes 224,384,512]

kernels     the predictions of the sparse form at keep 0.1, 224 pixels, by the PyTorch reference and by the kernels. float32
            kernels keep the reference's keys: every prediction should be the same. With q, k and v stored in bfloat16
            at least 99 % should be those of the float32 kernels.
tiles       one key set for each query (row by row), or for each tile of 2x2 to 4x8, at several image sizes. Each size is
            a conversion of its own, position embedding resampled; the yardstick is dense attention at that size.

Calibration sees 128 photographs of `imagenet-sample/train`, accuracy is measured on those of `accuracy.py`. Nothing is
timed. About 20 minutes on two cores.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from accuracy import DATA, WEIGHTS, photographs
from harness import Report, Row, conditions, judged, options, start
from torch import Tensor, nn
from variants import deit_tiny, variant

from sparsify.measure.accuracy import Logits
from sparsify.nn import attention, graft, hosts
from sparsify.nn.attention import Execution

PHOTOGRAPHS = 950
TILES: tuple[tuple[int, ...], ...] = ((), (2, 2), (4, 4), (4, 8))
BF16_AGREEMENT = 99.0  # percent


def batches(model: nn.Module, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Photographs and labels: every so many batches, so that about `images` are drawn from all classes."""
    every = max(1, round(PHOTOGRAPHS / images))
    return (batch for i, batch in enumerate(photographs(model)) if i % every == 0)


@torch.inference_mode()
def logits(models: dict[str, nn.Module], images: int) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of every model over the same photographs, float32, and the labels."""
    found: dict[str, list[Tensor]] = {name: [] for name in models}
    labels = []
    for x, y in batches(next(iter(models.values())), images):
        labels.append(y)
        for name, model in models.items():
            found[name].append(model(x.to(next(model.parameters()).dtype)).float())
    return {name: torch.cat(out) for name, out in found.items()}, torch.cat(labels)


def kernels(images: int, calib_images: int, report: Report) -> None:
    sparse = deit_tiny(224, calib_images)
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    models = {
        "reference, float32": variant(sparse, Execution("reference")),
        "kernels, float32": variant(sparse, Execution("cpu")),
        "kernels, float32 with bf16 storage": variant(sparse, Execution("cpu", "bf16")),
        "reference, bfloat16 model": variant(half, Execution("reference")),
        "kernels, bfloat16 model": variant(half, Execution("cpu")),
        "dense, bfloat16 model": graft.dense_twin(half),
        "dense, float32": graft.dense_twin(sparse),
    }
    bars = {"kernels, float32": 100.0, "kernels, float32 with bf16 storage": BF16_AGREEMENT}
    out, labels = logits(models, images)
    yard = {name: out["kernels, float32" if "bf16 storage" in name else "reference, float32"] for name in models}
    rows: list[Row] = []
    for name, given in out.items():
        same = given.argmax(1) == yard[name].argmax(1)
        agreement = 100 * float(same.double().mean())
        rows.append({
            "sparse form": name, "top-1, %": percent(given.argmax(1) == labels), "agreement, %": f"{agreement:.2f}",
            "predictions that differ": int((~same).sum()), **judged(agreement, bars.get(name)),
            "largest difference of a logit": float((given - yard[name]).abs().max()),
        })  # fmt: skip
    report.add(
        f"Kernels and reference, 224 pixels, {len(labels)} photographs", rows,
        "Agreement and differences: with the float32 reference; of bf16 storage with the float32 kernels.",
    )  # fmt: skip


def tiles(side: int, images: int, calib_images: int, report: Report) -> None:
    sparse = deit_tiny(side, calib_images)
    models = {" x ".join(map(str, tile)) or "row by row": variant(sparse, Execution("cpu"), tile) for tile in TILES}
    out, labels = logits({"dense": graft.dense_twin(sparse), **models}, images)
    rows: list[Row] = []
    for name, given in out.items():
        sums = Logits()
        sums.add(out["dense"], given, labels)
        e = sums.result(len(labels))
        figures = {
            "top-1, %": f"{e.top1:.2f}",
            "agreement with dense, %": f"{e.agreement:.2f}",
            "KL, nats": f"{e.kl:.4f}",
        }
        rows.append(
            {"queries with one key set": name, **figures, "lost / gained": f"{e.images_lost} / {e.images_gained}"}
        )
    cells = next(iter(attention.sparse_modules(sparse).values())).sparsity.cells[0]
    tokens, shape = hosts.num_tokens(sparse), f"{cells[0]}x{cells[1]} clusters"
    report.add(f"Tiles, {side} pixels, N = {tokens}, keep 0.1, {shape}, {len(labels)} photographs", rows)


def percent(right: Tensor) -> str:
    return f"{100 * float(right.double().mean()):.2f}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=PHOTOGRAPHS, help="photographs to measure on, about")
    parser.add_argument("--calib-images", type=int, default=128, help="photographs to calibrate on")
    parser.add_argument("--only", choices=("kernels", "tiles"), help="one of the two tables")
    parser.add_argument("--sizes", default="224,384,512", help="image sizes of the tiles, pixels")
    arguments = parser.parse_args()
    if not WEIGHTS.exists():
        raise SystemExit(f"no weights and photographs at {DATA}: set SPARSIFY_TEST_DATA")
    start(arguments)
    report = Report("Accuracy of kernels and tiles", conditions(arguments, calibration_images=arguments.calib_images))
    if arguments.only != "tiles":
        kernels(arguments.images, arguments.calib_images, report)
    if arguments.only != "kernels":
        for side in map(int, arguments.sizes.split(",")):
            tiles(side, arguments.images, arguments.calib_images, report)
    report.write(arguments.markdown, arguments.json)


if __name__ == "__main__":
    main()
