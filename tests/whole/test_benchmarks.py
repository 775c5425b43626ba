"""Every script of `benchmarks/` runs: at toy size, of random weights and a few pictures where it wants real ones."""

import functools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import _registry

import sparsify
from sparsify.ops.cpu import kernels

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {path.name: path for path in (ROOT / "benchmarks").glob("*.py")}
LIBRARIES = {
    "harness.py",
    "variants.py",
    "activations.py",
    "bounds.py",
    "gpu_models.py",
    "gpu_predictions.py",
    "gpu_tiles.py",
}  # that scripts import
DEPTH = 2  # of the models
CLASSES = ("n01440764", "n01443537")  # of ImageNet

# Arguments of each script; the Makefile's lines are the same scripts at full size.
TOY = {
    "accuracy.py": "--only 2,4 --calib-images 4",
    "against.py": f"--old {ROOT} --rounds 2 --threads 1 --model digits",
    "attention.py": "--inputs random --sizes 17 --rounds 1 --batch 2 --no-avx2",
    "auto.py": "--shapes 1 --rounds 1",
    "compiled.py": "--architecture deit_tiny_patch16_224 --rounds 1 --compiler eager --token-keep 0.7",
    "equality.py": "--only deit --depth 1",
    "exported.py": "toy.safetensors --images 2 --rounds 1 --formats pt2",
    "families.py": "beit --limit 1",
    "features.py": "--sizes 56 --images 4 --calib-images 4 --spread all",
    "finetune.py": "--only default --set stages.0.steps=1 --set stages.0.batch_size=4 --set calib_images=4",
    "fingerprints.py": "--only token-lowrank",
    "frontier.py": "--images 4 --calib-images 4 --only mean --output .",
    "gpu.py": "--toy --items ceilings,dense",  # all of it in test_gpu_benchmark.py
    "gpu_kernels.py": "--target sm_80 --model 'ViT-S/16 224'",
    "house.py": "",
    "kernel_accuracy.py": "--images 8 --calib-images 4 --sizes 224 --only tiles",
    "model.py": "--only 'deit_tiny, 224 pixels, float32' --rounds 1",
    "quantised.py": "--every 2",
    "serving.py": "--only '224 pixels, batch 1, keep 0.1' --rounds 1 --runtimes eager onnxruntime --dtypes float32",
    "survive.py": "--times 1 --commands convert",
    "tokens.py": "--only schedules,adaptive,rates --targets 0.8 --costs 0.9",
    "tokens_speed.py": "--only 'deit_small_patch16_224, 224 pixels, float32, batch 1' --rounds 1",
    "train_digits.py": "--epochs 1 --warmup-epochs 0 --holdout 8 --limit 8 --batch-size 8 --out .",
}


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory):
    """What `SPARSIFY_TEST_DATA` names, small."""
    folder = tmp_path_factory.mktemp("toy")
    for part in ("imagenet-sample/train", "imagenet-sample/val", "imagen-5perclass"):
        for i, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for j in range(8 if part.endswith("train") else 2):
                Image.effect_noise((64, 64), 40 + 20 * i + j).convert("RGB").save(folder / part / name / f"{j}.png")
    torch.manual_seed(0)
    for name, file in (
        ("deit_tiny_patch16_224", "deit_tiny_patch16_224"), ("vit_small_patch14_dinov2", "vit_small_patch14_saliency")
    ):  # fmt: skip
        save_file(timm.create_model(name, depth=DEPTH).state_dict(), folder / f"{file}.safetensors")
    return folder


@pytest.fixture
def shallow(monkeypatch):
    """The models that the benchmarks name are a few blocks deep."""

    def flattened(build):
        return functools.wraps(build)(lambda *given, **more: build(*given, **{"depth": DEPTH, **more}))

    for name in ("deit_tiny_patch16_224", "deit_small_patch16_224", "vit_small_patch14_dinov2"):
        monkeypatch.setitem(_registry._model_entrypoints, name, flattened(_registry._model_entrypoints[name]))


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - LIBRARIES))
def test_benchmark_runs_at_toy_size(name, shallow, toy_data, tmp_path, monkeypatch):
    if kernels.available():
        pytest.skip("no CPU kernels here")
    monkeypatch.setenv("SPARSIFY_TEST_DATA", str(toy_data))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    if "toy.safetensors" in TOY[name]:
        weights = toy_data / "deit_tiny_patch16_224.safetensors"
        sparsify.convert("deit_tiny", keep=0.1, weights=weights, calib_images=2, output="toy.safetensors")
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(TOY[name])])
    threads, before = torch.get_num_threads(), set(sys.modules)
    try:
        runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code
    finally:
        torch.set_num_threads(threads)
        for module in set(sys.modules) - before:
            if Path(getattr(sys.modules[module], "__file__", None) or "").parent == ROOT / "benchmarks":
                del sys.modules[module]


def test_the_makefile_runs_every_script_and_none_that_is_missing():
    named = re.findall(r"benchmarks/(\w+\.py)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert set(named) <= SCRIPTS.keys() and set(named) | {"train_digits.py"} == SCRIPTS.keys() - LIBRARIES
