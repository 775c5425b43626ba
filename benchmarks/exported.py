"""Exported programs beside the models they were made from, on real photographs: `make bench-exported`.

    python benchmarks/exported.py [FILE ...] [--images 96]

FILE: converted DeiT-Tiny files; without any it converts as `quantised.py` does. Photographs are those of
`imagenet-sample/val` (SPARSIFY_TEST_DATA). Programs take one image a call and have the sparse attention of the model, or
dense attention over the tokens present. The last column times that call, all in turns, with both models in eager mode.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import onnxruntime
import torch
from accuracy import DATA, WEIGHTS
from harness import Report, Row, conditions, options, start
from quantised import SETTINGS
from torch import Tensor
from variants import variant

import sparsify
from sparsify.images import datasets
from sparsify.jobs.export.program import FORMATS, export
from sparsify.measure.latency import interleaved
from sparsify.models import checkpoint
from sparsify.nn import graft
from sparsify.nn.attention import Execution, sparse_modules
from sparsify.recipe import load_recipe


def converted(folder: Path) -> list[Path]:
    files = []
    for name, changes in SETTINGS.items():
        recipe, images = load_recipe("calibrate").override(keep=0.1, **changes), DATA / "imagenet-sample" / "train"
        files.append(folder / f"{name}.safetensors")
        sparsify.convert("deit_tiny", recipe=recipe, output=files[-1], weights=WEIGHTS, data=images)
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
    same = (found.argmax(1) == expected.argmax(1)).float().mean().item()
    return {
        "": name, "median difference": f"{apart.median():.1e}", "largest": f"{apart.max():.1e}",
        "above 0.001": f"{(apart > 1e-3).sum()} of {len(apart)}", "same answer": f"{100 * same:.1f} %", "ms": ms,
    }  # fmt: skip


def main() -> None:
    parser = options(__doc__, rounds=11)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    arguments = parser.parse_args()
    start(arguments)
    if not WEIGHTS.exists():
        raise SystemExit(f"no weights and photographs at {DATA} (set SPARSIFY_TEST_DATA)")
    report = Report("Exported programs", conditions(arguments, onnxruntime=onnxruntime.__version__))
    with tempfile.TemporaryDirectory() as folder:
        for file in arguments.files or converted(Path(folder)):
            model = checkpoint.load(file).requires_grad_(False)
            shown = datasets.labelled(
                DATA / "imagenet-sample" / "val", 1000, datasets.transform(datasets.data_config(model))
            )
            x = torch.cat([images for images, _ in shown])[: arguments.images]
            runs: dict[str, Callable[[Tensor], Tensor]] = {"dense, eager": graft.dense_twin(model)}
            runs |= {f"sparse, eager, {name}": variant(model, Execution(name)) for name in ("cpu", "reference")}
            pairs = product(arguments.formats, ("sparse", "dense") if sparse_modules(model) else ("sparse",))
            runs |= {
                f"{attention} attention, {format}": program(file, format, attention) for format, attention in pairs
            }
            ms = interleaved({name: partial(run, x[:1]) for name, run in runs.items()}, rounds=arguments.rounds)
            expected = answers(runs["sparse, eager, cpu"], x)
            rows = [row(name, answers(run, x), expected, ms[name].median) for name, run in runs.items()]
            note = (
                f"Difference of logits (up to {expected.abs().max():.3g}) to the sparse model computed by the kernels."
            )
            report.add(file.stem, rows, note)
    report.write(arguments.markdown, arguments.json)


if __name__ == "__main__":
    main()
