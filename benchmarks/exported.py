"""Exported programs beside the models they were made from, on real photographs: `make bench-exported`.

    python benchmarks/exported.py [FILE ...] [--images 96] [--families]

FILE: converted files; without any it converts DeiT-Tiny as `quantised.py` does, or with `--families` three models with token
keep 0.6 at three stages and dense attention: DeiT-Tiny, a ViT-S/14 of features, and an EVA-02 (rotary embedding, SwiGLU,
random weights). Photographs are the 950 that nothing was calibrated on (SPARSIFY_TEST_DATA). Programs take one image a call
and have the sparse attention of the model, or dense attention over the tokens present. An answer is the largest output;
`margin` is the largest distance to the second one, in the model, where a program answers otherwise: near ties. The last
column times a call, all in turns, with both models in eager mode.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from accuracy import DATA, WEIGHTS, photographs
from features import WEIGHTS as FEATURES
from harness import Report, Row, conditions, options, start
from quantised import SETTINGS
from torch import Tensor
from variants import variant

import sparsify
from sparsify.jobs.against import profile_against
from sparsify.jobs.export.program import FORMATS, export
from sparsify.measure.latency import Budget, interleaved
from sparsify.models import checkpoint
from sparsify.nn import graft
from sparsify.nn.attention import Execution, sparse_modules
from sparsify.recipe import load_recipe


def converted(folder: Path) -> list[Path]:
    files = []
    for name, changes in SETTINGS.items():
        recipe, images = load_recipe("calibrate").override(**changes), DATA / "imagenet-sample" / "train"
        files.append(folder / f"{name}.safetensors")
        sparsify.convert("deit_tiny", recipe=recipe, output=files[-1], weights=WEIGHTS, data=images)
    return files


def families(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    eva = timm.create_model("eva02_tiny_patch14_224", num_classes=1000)
    models: dict[Any, dict[str, Any]] = {
        "deit_tiny": {"weights": WEIGHTS}, "vit_small_patch14_dinov2": {"weights": FEATURES, "img_size": 224}, eva: {},
    }  # fmt: skip
    files = [folder / f"{name}.safetensors" for name in ("DeiT-Tiny", "ViT-S 14", "EVA-02 tiny")]
    for (model, how), output in zip(models.items(), files, strict=True):
        tokens, data = {"keep": 0.6}, DATA / "imagenet-sample" / "train"
        sparsify.convert(model, keep="dense", tokens=tokens, data=data, calibrate_only=True, output=output, **how)
    return files


def program(file: Path, format: str, attention: str) -> Callable[[Tensor], Tensor]:
    """One image at a time, however many are given."""
    path = file.parent / f"{file.stem} {attention}{FORMATS[format].SUFFIX}"
    export(file, format, path, attention=attention, measure=False, force=True, say=print)
    run = FORMATS[format].runner(str(path))
    assert run is not None
    return lambda x: torch.cat([run(image) for image in x.split(1)])


@torch.inference_mode()
def answers(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([run(part) for part in x.split(8)])


def row(name: str, found: Tensor, expected: Tensor, ms: float | None) -> Row:
    apart = (found - expected).abs().amax(1)
    same, best = found.argmax(1) == expected.argmax(1), expected.topk(2, 1).values  # (B), (B, 2)
    margin = (best[:, 0] - best[:, 1])[~same]
    return {
        "": name, "median difference": f"{apart.median():.1e}", "largest": f"{apart.max():.1e}",
        "above 0.001": f"{(apart > 1e-3).sum()} of {len(apart)}", "same answer": f"{100 * same.float().mean():.2f} %",
        "margin": f"{margin.max():.1e}" if len(margin) else "-", "ms": ms,
    }  # fmt: skip


def main() -> None:
    parser = options(__doc__, rounds=11)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--families", action="store_true", help="three models with fewer tokens, one of each family")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    arguments = parser.parse_args()
    start(arguments)
    if not WEIGHTS.exists():
        raise SystemExit(f"no weights and photographs at {DATA} (set SPARSIFY_TEST_DATA)")
    report = Report("Exported programs", conditions(arguments, onnxruntime=onnxruntime.__version__))
    with tempfile.TemporaryDirectory() as folder:
        for file in arguments.files or (families if arguments.families else converted)(Path(folder)):
            model = checkpoint.load(file).requires_grad_(False)
            x = torch.cat([images for images, _ in photographs(model)])[: arguments.images]
            runs: dict[str, Callable[[Tensor], Tensor]] = {"dense, eager": graft.dense_twin(model)}
            runs |= {f"converted, eager, {name}": variant(model, Execution(name)) for name in ("cpu", "reference")}
            pairs = product(arguments.formats, ("sparse", "dense") if sparse_modules(model) else ("dense",))
            runs |= {
                f"{attention} attention, {format}": program(file, format, attention) for format, attention in pairs
            }
            ms = interleaved({name: partial(run, x[:1]) for name, run in runs.items()}, rounds=arguments.rounds)
            expected = answers(runs["converted, eager, cpu"], x)
            rows = [row(name, answers(run, x), expected, ms[name].median) for name, run in runs.items()]
            note = (
                f"Difference of outputs (up to {expected.abs().max():.3g}) to the converted model with the CPU kernels."
            )
            against = profile_against(model, ("onnxruntime", "openvino"), budget=Budget(rounds=arguments.rounds))
            speeds = {name: pair.same_runtime for name, pair in against.pairs.items()}
            told = ", ".join(f"{name} {speed.ratio:.2f}x" for name, speed in speeds.items() if speed)
            report.add(file.stem, rows, f"{note} Beside the dense program of the same runtime: {told}.")
    report.write(arguments.markdown, arguments.json)


if __name__ == "__main__":
    main()
