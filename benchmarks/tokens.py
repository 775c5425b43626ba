"""Fewer tokens on real weights: accuracy and MACs of searched schedules beside one rate for all blocks: `make bench-tokens`.

    python benchmarks/tokens.py [--threads 2] [--only schedules,adaptive,rates,ways]

DeiT-Tiny's weights and photographs from SPARSIFY_TEST_DATA, as in accuracy.py: calibration and the schedules see 128
photographs of `imagenet-sample/train`, no labels; accuracy is measured on the 950 others. Nothing is trained. MACs are
theoretical. About 10 minutes on two cores. Nothing is timed; tokens_speed.py does that.

    schedules   keep and token keep of every block chosen for shares of the MACs (`--target-macs 0.7,0.55,0.4`, one file)
    adaptive    two of these, or one and dense, by how sure the first is (`load(adaptive=)`); the mean cost is measured
    rates       the same share with one token rate for all blocks (all prefix rows of the last block included), and with
                one rate and the last block's patch rows left out; keep 0.1 everywhere
    ways        token keep 0.7 at blocks 4, 7 and 10: merge, evit, evit-fused, attention dense; importance fitted, and by
                attention
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accuracy import DATA, WEIGHTS, convert, errors, photographs
from torch import nn

import sparsify
from sparsify.config import SparsityConfig, Tokens
from sparsify.fit.calibrate.calibrate import fit_importance
from sparsify.fit.schedule import choose, search
from sparsify.fit.schedule import costs as costing
from sparsify.images.trainset import trainset
from sparsify.jobs.dense import Calibrator, Dense
from sparsify.measure.evaluate import evaluate
from sparsify.measure.profile import profile
from sparsify.models import checkpoint, names
from sparsify.nn import attention, graft, hosts, schedules
from sparsify.nn.adaptive import counting
from sparsify.processes import Compute, Listener
from sparsify.recipe import load_recipe

TARGETS = (0.7, 0.55, 0.4)
COSTS = (0.7, 0.65, 0.6, 0.55)
BARS = {0.7: (93, None), 0.55: (89, 1.0), 0.4: (80, None)}  # agreement in percent, points of top-1
HEAD = "| setting | whole model | top-1 (dense) | agreement | KL | lost / gained | 2 sqrt | bar |\n" + "|---" * 8 + "|"


def row(label: str, model: nn.Module, bar: tuple[float, float | None] | None = None) -> str:
    """One line of the table."""
    p = profile(model, measure=False)
    e = evaluate(model, graft.dense_twin(model), photographs(model))
    assert e.images_lost is not None and e.images_gained is not None
    assert e.agreement is not None and e.top1 is not None and e.dense_top1 is not None
    lost, gained, (agreement_words, kl) = e.images_lost, e.images_gained, errors(e)
    met = ""
    if bar is not None:
        agreement, points = bar
        ok = e.agreement >= agreement and (points is None or e.dense_top1 - e.top1 <= points)
        met = ("yes" if ok else "NO") + f": {agreement} %" + (f", {points:g} point" if points else "")
    change = 100 * (p.macs_sparse / p.macs_dense - 1)
    return (
        f"| {label} | {change:+.2f} % | {e.top1:.2f} ({e.dense_top1:.2f}) | {agreement_words} | {kl} | "
        f"{lost} / {gained} | {2 * (lost + gained) ** 0.5:.1f} | {met} |"
    )


def several(targets: Sequence[float], images: Path, output: Path) -> Path:
    """`sparsify convert deit_tiny --target-macs TARGET,TARGET,...`, its file."""
    start = time.perf_counter()
    made = sparsify.convert(
        "deit_tiny",
        recipe="calibrate",
        output=output,
        weights=WEIGHTS,
        data=images,
        target_macs=targets,
        say=lambda line: print(f"<!-- {line} -->", flush=True),
    )
    print(f"<!-- converted in {time.perf_counter() - start:.0f} s, {made.path.stat().st_size:,} bytes -->")
    return made.path


def adaptive_row(file: Path, cost: float) -> str:
    """One line of the table, of `sparsify.load(file, adaptive=cost)`."""
    model = sparsify.load(file, adaptive=cost, backend="cpu")
    rule, dense = model.rule, graft.dense_twin(model.first)
    with counting(model) as counted:
        e = evaluate(model, dense, photographs(dense))
    macs = {b: profile(each, measure=False) for b, each in (("first", model.first), ("second", model.second))}
    share, whole = counted["twice"] / e.images, macs["first"].macs_dense
    change = 100 * ((macs["first"].macs_sparse + share * macs["second"].macs_sparse) / whole - 1)
    agreement, kl = errors(e)
    lost, gained = e.images_lost, e.images_gained
    label = f"adaptive {cost}: {rule.first:g}, {100 * share:.1f} % again at {rule.second:g}"
    return (
        f"| {label} | {change:+.2f} % | {e.top1:.2f} ({e.dense_top1:.2f}) | {agreement} | {kl} | {lost} / {gained} | "
        f"{2 * (lost + gained) ** 0.5:.1f} | |"
    )


def one_rate(base: nn.Module, config: SparsityConfig, target: float, ends_empty: bool) -> nn.Module:
    """One token rate for all blocks that gives `target` of the dense MACs, keep 0.1 everywhere."""
    n0, depth = hosts.num_tokens(base) - 1, len(attention.attention_modules(base))
    dense = profile(base, measure=False).macs_dense
    plans = config.resolved(hosts.geometry(base, attention.attention_modules(base)))
    costs = costing.macs_costs(base, "merge", {**choose.options_of(base, config, (None,)), 0.1: plans})
    fixed = dense - search.price(costs, [n0] * (depth + 1), [None] * depth)
    low, high = 0.5, 1.0
    for _ in range(40):
        rate = (low + high) / 2
        counts = [n0, *(math.ceil(n0 * rate**i - 1e-9) for i in range(1, depth + 1))]
        counts[-1] = 0 if ends_empty else counts[-1]
        over = search.price(costs, counts, [0.1] * depth) + fixed > target * dense
        low, high = (low, rate) if over else (rate, high)
    rates = (low,) * (depth - 1) + (0.0 if ends_empty else low,)
    return schedules.applied(base, config.model_copy(update={"tokens": Tokens(keep=rates)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--only", default="schedules,adaptive,rates,ways", help="tables to print")
    parser.add_argument("--costs", type=float, nargs="+", default=COSTS, help="mean costs of adaptive inference")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="shares of the MACs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not WEIGHTS.exists():
        raise SystemExit(f"no weights at {DATA}: set SPARSIFY_TEST_DATA")
    images, wanted = DATA / "imagenet-sample" / "train", arguments.only.split(",")
    print(HEAD)
    if {"schedules", "adaptive"} & {*wanted}:
        with tempfile.TemporaryDirectory() as folder:
            file = several(arguments.targets, images, Path(folder) / "several.safetensors")
            for target in arguments.targets if "schedules" in wanted else ():
                model = checkpoint.read(file, budget=target).model
                print(row(f"--target-macs {target}", model, BARS.get(target)), flush=True)
            for cost in arguments.costs if "adaptive" in wanted else ():
                print(adaptive_row(file, cost), flush=True)
    if "rates" in wanted or "ways" in wanted:
        made = convert("deit_tiny", load_recipe("calibrate"), WEIGHTS, images)
        config, recipe = made.header.config, load_recipe("calibrate")
        dense = Dense(names.resolve("deit_tiny"), made.model)
        calibrator = Calibrator.on(trainset(str(images)), dense, recipe, Compute(batch_size=32), Listener())
        fit_importance(made.model, calibrator.batches)
        if "rates" in wanted:
            for target in arguments.targets:
                for empty in (False, True):
                    label = f"one rate for {target}" + (", last block's patch rows left out" if empty else "")
                    print(row(label, one_rate(made.model, config, target, empty)), flush=True)
        if "ways" in wanted:
            for way in ("merge", "evit", "evit-fused"):
                for importance in ("fitted", "attention"):
                    tokens = Tokens.model_validate({"way": way, "importance": importance})
                    model = schedules.applied(made.model, config.model_copy(update={"keep": "dense", "tokens": tokens}))
                    print(row(f"token keep 0.7, {way}, {importance}", model), flush=True)


if __name__ == "__main__":
    main()
