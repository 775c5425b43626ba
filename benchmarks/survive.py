"""Kills a fine-tuning again and again (SIGKILL) and looks whether what is resumed ends bit for bit as it would have.

    python benchmarks/survive.py                    # ten times, at moments drawn at random
    python benchmarks/survive.py --times 3 --seed 1

The run: the built-in digits, two stages (augmented and with a running mean; then from a cache of the teacher), a state
saved after every step. Every time a fresh run is killed once, behind a step drawn at random (or before the first), and
resumed with --resume. Compared are all tensors of the written file and all rows of metrics.csv but the images per second.
The weights of the last step are what is written, so that the comparison cannot be met by the calibrated model. Exit code
1 where anything differs.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

RECIPE = """
description: two short stages
sparsity: {keep: 0.1, rank: 12, spread_rank: false}
calib_images: 16
precision: float32
hold_back: 0.02
stages:
  - name: first
    train: all
    steps: 12
    batch_size: 8
    losses: {logits: 1.0, tokens: 0.5, attention: 0.5, attention_form: kl}
    augmentation: {form: train, scale: [0.5, 1.0], auto_augment: rand-m5, mixup: 0.4}
    drop_path: 0.1
    ema: 0.9
  - name: second
    train: backbone
    steps: 12
    batch_size: 8
    losses: {logits: 1.0, tokens: 0.5}
    augmentation: {form: eval}
    cache_teacher: true
"""
LATEST = "from sparsify.fit.finetune.validation import ValidationScore as S; S.better_than = lambda own, other: True"
PROGRAM = f"import sys; {LATEST}; from sparsify.cli.app import main; main(sys.argv[1:])"
TIMEOUT = 600


def command(folder: Path, *more: str) -> subprocess.Popen[str]:
    """The run in `folder`, started."""
    arguments = ["convert", "digits", "--data", "digits", "--recipe", "recipe.yaml", "-o", "m.safetensors"]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments, "--save-minutes", "0", *more], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed, once it is done."""
    out, err = process.communicate(timeout=TIMEOUT)
    if process.returncode:
        raise SystemExit(f"a run failed ({process.returncode}): {err.strip() or out.strip()}")
    return out


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without how fast it was."""
    path = folder / "m.run" / "metrics.csv"
    found = list(csv.DictReader(path.open())) if path.exists() else []
    return [{name: cell for name, cell in row.items() if name != "images_per_s"} for row in found]


def phase(folder: Path) -> str:
    """How far a killed run had got."""
    run, steps = folder / "m.run", rows(folder)
    if (folder / "m.safetensors").exists():
        return "written" if not (run / "start.safetensors").exists() else "writing"
    if steps:
        return f"{('first', 'second')[int(steps[-1]['stage'])]} stage, step {steps[-1]['step']}"
    return "before the first step" if (run / "start.safetensors").exists() else "starting, calibrating"


def equal(folder: Path, other: Path) -> bool:
    """Whether two runs came to the same."""
    one, two = (load_file(place / "m.safetensors") for place in (folder, other))
    same = one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())
    return same and rows(folder) == rows(other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    drawn, differs = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as base:
        folders = [Path(base) / str(i) for i in range(options.times + 1)]
        for folder in folders:
            folder.mkdir()
            (folder / "recipe.yaml").write_text(RECIPE)
        undisturbed, *others = folders
        begun = time.monotonic()
        finish(command(undisturbed))
        whole = time.monotonic() - begun
        print(f"undisturbed: {whole:.1f} s, {len(rows(undisturbed))} steps\n")
        print("| killed after | it was | resumed | equal |\n|---|---|---|---|")
        for folder in others:
            begun, step, late = time.monotonic(), drawn.randrange(len(rows(undisturbed))), drawn.random()
            process = command(folder)
            while step and process.poll() is None and len(rows(folder)) < step:
                time.sleep(0.005)
            time.sleep(late * (0.3 if step else whole / 3))  # step 0: while it starts and calibrates
            process.kill()
            process.communicate()
            moment, place = time.monotonic() - begun, phase(folder)
            said = finish(command(folder, "--resume")).splitlines()
            line = next((line for line in said if "resum" in line or "going on" in line or "anew" in line), "")
            words = line.rpartition("m.run ")[2] if line.startswith("resuming") else line.rpartition(": ")[2]
            same = equal(folder, undisturbed)
            differs += not same
            print(f"| {moment:.1f} s | {place} | {words} | {'yes' if same else 'NO'} |", flush=True)
    print(f"\n{options.times - differs} of {options.times} ended bit for bit as the undisturbed run")
    raise SystemExit(differs > 0)


if __name__ == "__main__":
    main()
