"""Fingerprints of converted files for fixed seeds: one line a file, equal where every tensor is equal to the bit.

    python benchmarks/fingerprints.py > before.txt        # in one checkout
    python benchmarks/fingerprints.py | diff before.txt -  # in another

Eight files: both predictors, a list of keeps, tokens by stages and for a target, a recipe that fine-tunes, and DeiT-Tiny's
real weights where they are (SPARSIFY_TEST_DATA, default ../shared/data). Each line holds the SHA-256 of all tensors and of
the header without dates, versions and threads. Only the public API is used. Three minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import sparsify

DATA = Path(os.environ.get("SPARSIFY_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
WEIGHTS = DATA / "deit_tiny_patch16_224.safetensors"
VOLATILE = ("date", "versions", "threads")
DIGEST = "sparsify.sha256"  # of the header itself, its date included
TUNED = Path(__file__).resolve().parents[1] / "recipes" / "paper-digits.yaml"

DIGITS: dict[str, dict[str, Any]] = {
    "head-lowrank": dict(keep=0.1),
    "head-lowrank by block": dict(keep=[0.3, "dense", 0.1, 0.05], tail="mean", rank=8),
    "token-lowrank": dict(keep=0.1, predictor="token-lowrank", rank=16),
    "token keep": dict(keep=0.2, tokens={"keep": 0.7, "stages": [2, 3]}),
    "target 0.6": dict(target_macs=0.6),
    "fine-tuned": dict(recipe=str(TUNED), data="digits"),
}
REAL: dict[str, dict[str, Any]] = {
    "deit_tiny, keep 0.1": dict(keep=0.1),
    "deit_tiny, target 0.7": dict(target_macs=0.7),
}


def fingerprint(path: Path) -> tuple[str, str]:
    """SHA-256 of the tensors, and of the header without what differs from run to run; 16 digits of each."""
    tensors, header = hashlib.sha256(), {}
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).contiguous()
            tensors.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            tensors.update(tensor.view(torch.uint8).numpy().tobytes())
        header = {key: _stable(value) for key, value in sorted((file.metadata() or {}).items()) if key != DIGEST}
    return tensors.hexdigest()[:16], hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]


def _stable(value: str) -> Any:
    try:
        tree = json.loads(value)
    except ValueError:
        return value
    if isinstance(tree, dict):
        tree = {key: each for key, each in tree.items() if key not in VOLATILE}
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files whose name has this in it")
    wanted = parser.parse_args().only
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for kind, name, weights in (*((k, "digits", None) for k in DIGITS), *((k, "deit_tiny", WEIGHTS) for k in REAL)):
            if wanted not in kind:
                continue
            if weights is not None and not weights.exists():
                print(f"{kind}: no {weights.name} in SPARSIFY_TEST_DATA", file=sys.stderr)
                continue
            output = Path(folder) / "model.safetensors"
            options = (DIGITS | REAL)[kind]
            sparsify.convert(name, output=output, weights=weights, force=True, **options)
            print(f"{kind:24} tensors {fingerprint(output)[0]}  header {fingerprint(output)[1]}", flush=True)


if __name__ == "__main__":
    main()
