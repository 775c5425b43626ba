"""Accuracy and MACs of converted models on real weights and photographs, as Markdown tables: `make bench-accuracy`.

    python benchmarks/accuracy.py [--threads 2] [--only 1,2,4,6]

Reads DeiT-Tiny's weights and ImageNet photographs from SPARSIFY_TEST_DATA (default ../shared/data; see
CONTRIBUTING.md for its layout). Calibration sees 128 photographs of `imagenet-sample/train`, or none (the built-in
pictures); accuracy is measured on the 950 of `imagenet-sample/val` and `imagen-5perclass`, which calibration never sees.
About 10 minutes on two cores. Nothing is timed.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from itertools import chain
from pathlib import Path

import timm
import torch

import sparsify
from sparsify.config import SparsityConfig
from sparsify.images import datasets
from sparsify.jobs.convert import Conversion
from sparsify.measure.accuracy import Evaluation
from sparsify.measure.evaluate import evaluate
from sparsify.measure.profile import profile
from sparsify.nn import graft
from sparsify.recipe import Recipe, load_recipe

DATA = Path(os.environ.get("SPARSIFY_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
WEIGHTS = DATA / "deit_tiny_patch16_224.safetensors"
LOW = (0.106, 8)  # keep and rank by which MHSA MACs fall by 76 % (DeiT-Tiny at 224 pixels)
HEAD = (
    "| keep | MHSA | images | dense top-1 | top-1 | agreement | KL | lost / gained | within 2 sqrt |\n"
    + "|---" * 9
    + "|"
)


def photographs(model: torch.nn.Module) -> chain:
    """The 950 photographs that calibration never sees, with labels."""
    transform = datasets.transform(datasets.data_config(model))
    return chain(
        *(datasets.labelled(DATA / part, 1000, transform) for part in ("imagenet-sample/val", "imagen-5perclass"))
    )


def errors(e: Evaluation) -> tuple[str, str]:
    """Agreement and KL with their standard errors: the binomial one, and the deviation over the images / sqrt(images)."""
    assert e.agreement is not None and e.kl is not None and e.kl_error is not None
    share = e.agreement / 100
    return (
        f"{e.agreement:.2f} +- {100 * math.sqrt(share * (1 - share) / e.images):.2f} %",
        f"{e.kl:.4f} +- {e.kl_error:.4f}",
    )


def row(keep: float, model: torch.nn.Module, e: Evaluation) -> str:
    """One line of the table `HEAD`."""
    assert e.images_lost is not None and e.images_gained is not None
    lost, gained = e.images_lost, e.images_gained
    within = "yes" if abs(lost - gained) <= 2 * math.sqrt(lost + gained) else "NO"
    (agreement, kl), p = errors(e), profile(model, measure=False)
    mhsa = 100 * (p.mhsa_macs_sparse / p.mhsa_macs_dense - 1)
    return (
        f"| {keep:g} | {mhsa:+.1f} % | {e.images} | {e.dense_top1:.2f} | {e.top1:.2f} | {agreement} | {kl} | "
        f"{lost} / {gained} | {within} |"
    )


def calibrating(images: int | None) -> Recipe:
    """The recipe `calibrate`, on this number of images if it is given."""
    return load_recipe("calibrate").override(calib_images=images)


def convert(name: str, recipe: Recipe, weights: Path | None, images: Path | None) -> Conversion:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.safetensors"
        return sparsify.convert(name, recipe=recipe, output=output, weights=weights, data=images)


def deit_tiny(images: Path | None, keeps: list[float], recipe: Recipe) -> None:
    print(HEAD)
    for keep in keeps:
        made = convert("deit_tiny", recipe.override(keep=keep), WEIGHTS, images)
        result = evaluate(made.model, graft.dense_twin(made.model), photographs(made.model))
        print(row(keep, made.model, result), flush=True)


def macs() -> None:
    """DeiT-S at 224 pixels with the settings of the accuracy table; random weights, which MACs do not see."""
    print("| setting | MHSA MACs | change | whole model | change |\n|---|---|---|---|---|")
    default = load_recipe("calibrate").sparsity
    cases = {
        "default, keep 0.1, folded": default,
        "the same, not folded (as where q/k norm forbids it)": default.model_copy(update={"fold": False}),
        "default, keep 0.25": default.model_copy(update={"keep": 0.25}),
        "default, keep 0.05": default.model_copy(update={"keep": 0.05}),
        "paper-calibrated, keep 0.1": load_recipe("paper-calibrated").sparsity,
    }
    for label, config in cases.items():
        p = profile(graft.graft(timm.create_model("deit_small_patch16_224").eval(), config), measure=False)
        if label.startswith("default, keep 0.1"):
            print(f"| dense | {p.mhsa_macs_dense:,} | | {p.macs_dense:,} | |")
        cells = [f"{part:,} | {100 * (part / whole - 1):+.1f} %" for part, whole in
                 ((p.mhsa_macs_sparse, p.mhsa_macs_dense), (p.macs_sparse, p.macs_dense))]  # fmt: skip
        print(f"| {label} | {cells[0]} | {cells[1]} |")
        assert p.macs_dense - p.macs_sparse == p.mhsa_macs_dense - p.mhsa_macs_sparse or not config.fold
    print(f"\nkept pairs, one key more: {_per_key(True):,} folded, {_per_key(False):,} not folded\n")


def _per_key(fold: bool) -> int:
    kept = []
    for b in (20, 21):
        config = SparsityConfig(keep=b / 197, fold=fold, spread="none")
        dense = timm.create_model("deit_small_patch16_224").eval()
        kept.append(profile(graft.graft(dense, config), measure=False).kept_macs)
    return kept[1] - kept[0]


def built_in_digits(recipe: Recipe) -> None:
    made = convert("digits", recipe, None, None)
    images = datasets.labelled("digits", 10, datasets.transform(datasets.data_config(made.model)))
    print(HEAD)
    print(row(0.1, made.model, evaluate(made.model, graft.dense_twin(made.model), images)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument(
        "--only", default="1,2,4,6", help="tables to print: 1 photographs, 2 built-in, 4 MACs, 6 digits"
    )
    parser.add_argument("--calib-images", type=int, help="images to calibrate on (default: the recipe's)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = calibrating(arguments.calib_images)
    wanted = arguments.only.split(",")
    if not WEIGHTS.exists() and {"1", "2"} & set(wanted):
        print(f"photographs and weights are not at {DATA}: tables 1 and 2 are left out (set SPARSIFY_TEST_DATA)")
        wanted = [w for w in wanted if w not in "12"]
    if "1" in wanted:
        print("\n1. DeiT-Tiny, calibrated on 128 photographs, no labels\n")
        deit_tiny(DATA / "imagenet-sample" / "train", [0.1, 0.25, 0.05], recipe)
        keep, rank = LOW
        print(f"\nThe same, with the budget of rank {rank}\n")
        deit_tiny(DATA / "imagenet-sample" / "train", [keep], recipe.override(rank=rank))
    if "2" in wanted:
        print("\n2. DeiT-Tiny, calibrated on the built-in pictures\n")
        deit_tiny(None, [0.1], recipe)
    if "4" in wanted:
        print("\n4. DeiT-Small at 224 pixels, theoretical MACs per image\n")
        macs()
    if "6" in wanted:
        print("\n6. digits, calibrated on its training split\n")
        built_in_digits(recipe)


if __name__ == "__main__":
    main()
