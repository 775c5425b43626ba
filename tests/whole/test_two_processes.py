"""Fine-tuning in two processes: each learns from its half of every batch, and the losses are those of one."""

import os
import subprocess
import sys

import pytest
import torch

from helpers import small_runs

COMMON = [
    "precision=float32", "hold_back=0.01", "calib_images=8", "sparsity.spread=none",
]  # fmt: skip
STAGE = ["steps=3", "batch_size=8", "augmentation={form: eval}", "schedule={warmup_share: 0.4}"]
RUNS = {
    "paper": [f"stages.{i}.{s}" for i in (0, 1) for s in STAGE] + ["sparsity.rank=36"],
    "distill": [f"stages.0.{s}" for s in STAGE],
}


def arguments(recipe, name):
    sets = [word for each in COMMON + RUNS[recipe] for word in ("--set", each)]
    return ["convert", "digits", "--data", "digits", "--recipe", recipe, *sets, "-o", f"{name}.safetensors"]


def launched(folder, *more):
    how = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sparsify"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*how, *more], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("recipe", RUNS)
def test_two_processes_learn_what_one_learns(run, tmp_path, recipe):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has: sums in another order may choose another key
    try:
        code, out, err = run(*arguments(recipe, "one"))
    finally:
        torch.set_num_threads(threads)
    assert code == 0, err
    two = launched(tmp_path, *arguments(recipe, "two"))
    assert two.returncode == 0, two.stderr
    rows, others = small_runs.losses(tmp_path / "one.run"), small_runs.losses(tmp_path / "two.run")
    assert len(rows) == len(others) == 3 * len({row["stage"] for row in small_runs.metrics(tmp_path / "one.run")})
    for row, other in zip(rows, others, strict=True):
        first = row == rows[0]  # afterwards Adam has made 1e-7 of a small gradient a step of the learning rate
        assert other == pytest.approx(row, rel=1e-6 if first else 1e-4, abs=1e-7)
    for row, other in zip(*(small_runs.validations(tmp_path / f"{name}.run") for name in ("one", "two")), strict=True):
        assert float(other["kl"]) == pytest.approx(float(row["kl"]), rel=1e-3, abs=1e-6)
        assert (other["images"], other["agreement"], other["weights"]) == (
            row["images"],
            row["agreement"],
            row["weights"],
        )
    for words in ("wrote two.safetensors", "judged on 12 held-out images", "kept the"):
        assert (two.stdout + two.stderr).count(words) == 1, words
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["one.run", "two.run"]
