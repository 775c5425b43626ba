"""Fine-tuning on real weights: what label-free recipes bring back, what stage 1 learns: `make bench-finetune`.

    python benchmarks/finetune.py [--threads 2] [--only paper,default,tokens,reconstruct] [--seed 0]

DeiT-Tiny's weights and photographs from SPARSIFY_TEST_DATA, as in accuracy.py: everything learns from the 800 photographs of
`imagenet-sample/train` without labels; accuracy is measured on the 950 others. About an hour on two cores.

    paper         the paper's form (token-lowrank, no tail), keep 0.1: recipe paper-distill
    default       the default recipe at keep 0.05
    tokens        fewer tokens, whole-model MACs down by more than 60 %: recipe distill-tokens, --target-macs 0.3995
    reconstruct   stage 1 alone, from the closed-form start: loss and kept share of the true attention's mass, by layer
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from accuracy import DATA, WEIGHTS, photographs
from torch import Tensor, nn

import sparsify
from sparsify.fit.finetune.losses import attention
from sparsify.fit.finetune.objective import true_attention
from sparsify.measure.evaluate import evaluate
from sparsify.measure.profile import profile
from sparsify.models import checkpoint, names, pretrained
from sparsify.nn.attention import attention_modules
from sparsify.nn.observe import observe
from sparsify.nn.predictor import Reconstruction, TokenLowrankPredictor
from sparsify.ops.selection import top_b
from sparsify.ops.spec import budget
from sparsify.recipe import Augmentation, Recipe, Stage, load_recipe

HEAD = (
    "| recipe | minutes | MHSA | whole model | | top-1 (dense) | agreement | KL | lost / gained | bar |\n"
    + "|---" * 10
    + "|"
)
FORMS: dict[str, dict[str, object]] = {
    "squares": {"attention": 0.01},  # the paper's, summed over 168 images
    "kl": {"attention": 1.0, "attention_form": "kl"},
    "mass": {"attention": 0.0, "mass": 1.0},
    "both": {"attention": 0.0025, "attention_blocks": "rms", "reference_batch": 1, "mass": 1.0},
}


def convert(recipe: Recipe, folder: Path, name: str, target: float | None = None) -> tuple[nn.Module, float]:
    """`sparsify convert deit_tiny` by `recipe` on the photographs to learn from, and its minutes."""
    start = time.perf_counter()
    sparsify.convert(
        "deit_tiny",
        recipe=recipe,
        output=folder / f"{name}.safetensors",
        weights=WEIGHTS,
        data=DATA / "imagenet-sample" / "train",
        target_macs=target,
        say=lambda line: print(f"<!-- {line} -->", flush=True),
    )
    return checkpoint.load(folder / f"{name}.safetensors"), (time.perf_counter() - start) / 60


def recipe(name: str, arguments: argparse.Namespace) -> Recipe:
    """A recipe with the seed and the fields that were asked for."""
    return load_recipe(name).override(seed=arguments.seed).set(arguments.set)


def rows(name: str, recipe: Recipe, dense: nn.Module, bar: str, target: float | None = None) -> None:
    """Two lines of the table: calibrated only, and fine-tuned."""
    with tempfile.TemporaryDirectory() as folder:
        for label, chosen in (("calibrated", recipe.without_training()), ("fine-tuned", recipe)):
            model, minutes = convert(chosen, Path(folder), label, target)
            p, e = profile(model, measure=False), evaluate(model, dense, photographs(model))
            mhsa, whole = 100 * (p.mhsa_macs_sparse / p.mhsa_macs_dense - 1), 100 * (p.macs_sparse / p.macs_dense - 1)
            print(
                f"| {name} | {minutes:.1f} | {mhsa:+.1f} % | {whole:+.2f} % | {label} | {e.top1:.2f} ({e.dense_top1:.2f}) | "
                f"{e.agreement:.2f} % | {e.kl:.4f} | {e.images_lost} / {e.images_gained} | {bar} |",
                flush=True,
            )


def by_layer(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> list[tuple[float, float]]:
    """For each block: squared error per row of the reconstructed attention, and the kept share of the true one's mass."""
    modules = list(attention_modules(model).values())
    sums = torch.zeros(len(modules), 3, dtype=torch.float64)

    def add(block: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        module = modules[block]
        assert isinstance(module.predictor, TokenLowrankPredictor)
        P = module.sparsity.prefix
        true = true_attention(q, k, module.scale, P)  # (B, H, n, N)
        scores = module.predictor.reconstruct(q, k, module.scale, Reconstruction(False, False))[:, :, P:]
        kept = top_b(scores, [budget(keep, q.shape[2]) for keep in module.sparsity.keeps])
        count = true[..., 0].numel()
        error = float(attention(scores, true, "mse-sum", 1).sum())
        sums[block] += torch.tensor([error, float((true * kept).sum()), count], dtype=torch.float64)

    observe(dense, batches, add)
    return [(float(e / n), float(mass / n)) for e, mass, n in sums]


def reconstruction(first: Stage, form: str, epochs: int, lr: float) -> Stage:
    """The paper's first stage with other losses, on the coefficients and the basis that choose the keys."""
    return first.model_copy(
        update={
            "name": f"stage 1, {form}", "batch_size": 16, "ema": None, "epochs": epochs, "validate_every": None,
            "losses": first.losses.model_copy(update={"coefficients": "kept", "basis": "used", **FORMS[form]}),
            "augmentation": Augmentation(scale=(0.35, 1.0)),
            "optimiser": first.optimiser.model_copy(update={"lr": lr, "weight_decay": 0.0}),
            "schedule": first.schedule.model_copy(update={"warmup": 0.5, "min_lr": lr / 100}),
        }
    )  # fmt: skip


def reconstruct(seed: int, dense: nn.Module, forms: list[str], epochs: int, lr: float) -> None:
    """Prints the table of stage 1, which learns from these of `FORMS`, one after the other."""
    recipe = load_recipe("paper-distill").override(seed=seed)
    stages = tuple(reconstruction(load_recipe("paper").stages[0], form, epochs, lr) for form in forms)
    trained = recipe.model_copy(update={"stages": stages, "repair": None, "hold_back": 0.125})
    batches = [x for x, _ in photographs(dense)]
    with tempfile.TemporaryDirectory() as folder:
        start, _ = convert(recipe.without_training(), Path(folder), "start")
        learned, _ = convert(trained, Path(folder), "learned")
        found = by_layer(start, dense, batches), by_layer(learned, dense, batches)
    print("| block | squared error per row: closed form | after stage 1 | kept mass: closed form | after stage 1 |")
    print("|---" * 5 + "|")
    for i, ((e0, m0), (e1, m1)) in enumerate(zip(*found, strict=True), 1):
        print(f"| {i} | {e0:.5f} | {e1:.5f} | {100 * m0:.2f} % | {100 * m1:.2f} % |", flush=True)
    means = [sum(x[i] for x in part) / len(part) for part in found for i in (0, 1)]
    print(f"| mean | {means[0]:.5f} | {means[2]:.5f} | {100 * means[1]:.2f} % | {100 * means[3]:.2f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--only", default="paper,default,tokens,reconstruct", help="tables to print")
    parser.add_argument(
        "--form", default="both", help=f"losses of `reconstruct`: {', '.join(FORMS)}, or several stages with +"
    )
    parser.add_argument("--epochs", type=int, default=12, help="of each stage of `reconstruct`")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of `reconstruct`")
    parser.add_argument("--seed", type=int, default=0, help="of split, order and augmentation")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the label-free recipes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not WEIGHTS.exists():
        raise SystemExit(f"no weights at {DATA}: set SPARSIFY_TEST_DATA")
    wanted = arguments.only.split(",")
    dense = pretrained.load(names.resolve("deit_tiny"), WEIGHTS)
    print(HEAD)
    if "paper" in wanted:
        rows("paper-distill, keep 0.1", recipe("paper-distill", arguments), dense, "84 % in 20 min")
    if "default" in wanted:
        low = recipe("distill", arguments).override(keep=0.05)
        rows("distill, keep 0.05", low, dense, "+2 points, top-1 within 1, in 10 min")
    if "tokens" in wanted:
        rows("distill-tokens", recipe("distill-tokens", arguments), dense, "86 % in 20 min", 0.3995)
    if "reconstruct" in wanted:
        reconstruct(arguments.seed, dense, arguments.form.split("+"), arguments.epochs, arguments.lr)


if __name__ == "__main__":
    main()
