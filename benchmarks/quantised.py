"""Accuracy of int8 models (torchao, torch.ao, onnxruntime), dense and sparse, on real weights: `make bench-quantised`.

    python benchmarks/quantised.py [FILE ...]

Reads DeiT-Tiny's weights and photographs from SPARSIFY_TEST_DATA as `accuracy.py` does, and measures on the same 950.
Without files of its own it converts from 128 photographs: keep 0.1, and token keep 0.7 besides. Every linear layer is
quantised after the conversion: weights to int8 by output channel (`weights`), or those and the activations of each call by
token (`weights and activations`), or both with one scale for a whole tensor (`per tensor`: torch.ao), or as
`sparsify export --int8` does it. Nothing is timed.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accuracy import DATA, WEIGHTS, photographs
from harness import Report as Tables
from harness import Row, conditions, options
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torchao import __version__ as torchao_version
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import sparsify
from sparsify.jobs.export.program import FORMATS, IN_INT8
from sparsify.measure.accuracy import Logits
from sparsify.models import checkpoint
from sparsify.nn import graft
from sparsify.recipe import load_recipe

CONFIGS = {"weights": Int8WeightOnlyConfig, "weights and activations": Int8DynamicActivationInt8WeightConfig}
SETTINGS = {
    "dense": {"keep": "dense"},
    "keep 0.1": {"keep": 0.1},
    "keep 0.1, token keep 0.7": {"keep": 0.1, "tokens": {"keep": 0.7, "way": "merge"}},
}


def converted(folder: Path) -> dict[str, Path]:
    """Name -> file; the first is the dense model, in which nothing is folded."""
    images, files = DATA / "imagenet-sample" / "train", {}
    for name, changes in SETTINGS.items():
        recipe = load_recipe("calibrate").override(**changes)
        output = folder / f"{name}.safetensors"
        files[name] = sparsify.convert("deit_tiny", recipe=recipe, output=output, weights=WEIGHTS, data=images).path
    output, how = folder / "0.55 of MACs by tokens.safetensors", {"target_macs": 0.55, "runtime": "openvino"}
    files[output.stem] = sparsify.convert(
        "deit_tiny", output=output, weights=WEIGHTS, data=images, calibrate_only=True, **how
    ).path
    return files


def per_tensor(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to move into torchao, which quantises by channel
        return quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def program(file: Path, format: str, folder: Path) -> Callable[[Tensor], Tensor]:
    """The program of `sparsify export --int8`."""
    path = folder / f"int8{FORMATS[format].SUFFIX}"
    sparsify.export(file, format, path, batch_size=None, int8=True, measure=False, force=True)
    run = FORMATS[format].runner(str(path))
    assert run is not None
    return run


def int8(model: nn.Module, config: type) -> nn.Module:
    quantised = copy.deepcopy(model)
    quantize_(quantised, config())
    return quantised


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="converted files (deit_tiny)")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="every K-th photograph of the 950")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not WEIGHTS.exists():
        raise SystemExit(f"no weights and photographs at {DATA} (set SPARSIFY_TEST_DATA)")
    models: dict[str, Callable[[Tensor], Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        own = {file.stem: file for file in arguments.files}
        for name, file in (own or converted(Path(folder))).items():
            model = models[name] = checkpoint.load(file)
            models |= {f"{name}, int8 {what}": int8(model, config) for what, config in CONFIGS.items()}
            models[f"{name}, int8 per tensor"] = per_tensor(model)
            models |= {f"{name}, {format} --int8": program(file, format, Path(folder)) for format in IN_INT8}
    dense = graft.dense_twin(model) if own else models["dense"]
    sums, images = {name: Logits() for name in models}, 0
    with torch.inference_mode():
        for x, y in photographs(dense):
            x, y = x[:: arguments.every], y[:: arguments.every]
            expected = dense(x)
            for name, model in models.items():
                sums[name].add(expected, model(x), y)
            images += len(x)
    rows: list[Row] = []
    for name, total in sums.items():
        e = total.result(images)
        assert e.top1 is not None and e.agreement is not None and e.kl is not None
        rows.append({
            "model": name, "top-1": f"{e.top1:.2f} %", "agreement": f"{e.agreement:.2f} %", "KL": f"{e.kl:.4f}",
            "lost / gained": f"{e.images_lost} / {e.images_gained}",
        })  # fmt: skip
    tables = Tables("int8 after conversion", conditions(arguments, torchao=torchao_version))
    tables.add("DeiT-Tiny", rows, f"{images} photographs; agreement with, and KL to, the dense float32 model.")
    tables.write(arguments.markdown, arguments.json)


if __name__ == "__main__":
    main()
