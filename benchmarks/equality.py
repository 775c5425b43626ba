"""keep=1 equals dense for one model of each kind at its own image size and depth, as a Markdown table.

    python benchmarks/equality.py [--only deit,dinov2] [--depth 2]

The small versions of this are in `tests/nn/test_graft.py`. Weights are random (attention made uneven), predictors are
fitted on two random images; logits go through predictor, selection and sparse op with b = N. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch

from sparsify.config import SparsityConfig
from sparsify.fit.calibrate.calibrate import calibrate
from sparsify.nn import attention, hosts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers.families import FAMILIES, build, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAMILIES), help="kinds, between commas")
    parser.add_argument("--depth", type=int, help="blocks of each model (default: its own)")
    arguments = parser.parse_args()
    print("| kind | timm name | N | blocks | largest difference of an output | largest output |\n" + "|---" * 6 + "|")
    worst = 0.0
    for family in arguments.only.split(","):
        name, dense = FAMILIES[family][0], build(family, patches=None, depth=arguments.depth)
        model, x = copy.deepcopy(dense), images(dense, 1)
        calibrate(model, SparsityConfig(keep=1.0, spread="none"), lambda x=x: [x])
        with torch.inference_mode():
            expected = dense(x)
            difference = float((model(x) - expected).abs().max())
        tokens, blocks = hosts.num_tokens(dense), len(attention.sparse_modules(model))
        print(
            f"| {family} | {name} | {tokens} | {blocks} | {difference:.1e} | {float(expected.abs().max()):.2f} |",
            flush=True,
        )
        assert blocks == len(dense.blocks)
        worst = max(worst, difference)
    print(f"\nworst: {worst:.1e}; {'within' if worst <= 1e-4 else 'NOT WITHIN'} 1e-4")


if __name__ == "__main__":
    main()
