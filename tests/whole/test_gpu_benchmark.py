"""`benchmarks/gpu.py` runs to its end without a GPU, and its prototype computes what the package does."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}

DRAWN = """
import torch, gpu_tiles as tiles
from sparsify.ops.attention import attention
from sparsify.ops.selection import Context, Ranking
from sparsify.ops.spec import Spec

torch.manual_seed(0)
full, half = torch.float32, torch.float16
for grid, P, b, cells, tile, dtype in [
    ((8, 8), 1, 20, (2, 2), (8, 8), half), ((9, 13), 0, 40, (3, 4), (8, 8), full), ((6, 11), 5, 71, (2, 3), (8, 16), full),
]:
    N = P + grid[0] * grid[1]
    q, k, v = torch.randn(1, N, 3, 2, 32).permute(2, 0, 3, 1, 4).to(dtype).unbind(0)
    if b == 40:
        q, k = q.round(), k.round()  # equal scores
    s = tiles.Settings(16, b, P, grid, cells, tile, exact=True)
    found = tiles.attention(q, k, v, 0.2, s)
    ranking = Ranking(None, None, None, None, 0.0, (16,) * 2)
    expected = attention(q, k, v, ranking, Context(), Spec.uniform(b, P, "clusters", grid, cells, tile, 0.2), "reference")
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert error < (1e-5 if dtype == torch.float32 else 2e-3), (grid, dtype, error)
    made = tiles.prepare(k, v, s)
    rough = tiles.choose(tiles.score(q, k, made, s._replace(bits=16, quads=True)), made, s._replace(bits=16))
    assert rough.index.shape[-1] == b and (rough.index.diff(dim=-1) > 0).all() and rough.index.max() < N
    assert (rough.dropped.sum(-1) == N - b).all()
"""


def test_the_prototype_of_tiles_computes_what_the_package_does():
    done = subprocess.run([sys.executable, "-c", DRAWN], env=INTERPRETED, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_script_runs_to_its_end_and_tells_each_figure_at_once(tmp_path):
    words = [
        ROOT / "benchmarks" / "gpu.py",
        "--toy",
        "--markdown",
        tmp_path / "gpu.md",
        "--json",
        tmp_path / "gpu.json",
    ]
    done = subprocess.run([sys.executable, *map(str, words)], env=INTERPRETED, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    items = {line.get("item") for line in lines}
    assert {"ceilings", "check", "dense", "tiles", "merging", "models"} <= items and "left out" not in items, lines
    assert all(line["right"] for line in lines if line.get("item") == "check" and "right" in line)
    assert {line["by"] for line in lines if "by" in line} == {"torch", "triton"}
    tables = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert tables.count("## ") == 6 and "| predicted |" in tables and "faster_than_dense" in tables
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"].keys() == {*items} - {None}


def test_without_a_gpu_one_line_says_so(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="^no GPU is here: --toy"):
        runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"), run_name="__main__")


LIMITS = {
    "_cluster": (128, 40_000), "_average": (160, 40_000), "_score": (232, 40_000), "_choose": (64, 8_000),
    "_attend": (176, 66_000),
}  # fmt: skip
"""Registers of a thread and bytes of shared memory, at most."""


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_prototype_compiles_without_spills(target, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_tiles as tiles

    from helpers import aot

    found = []
    monkeypatch.setattr(
        tiles, "launch", lambda kernel, grid, arguments, **o: found.append(aot.Launch(kernel, arguments, o))
    )
    monkeypatch.setattr(tiles, "_major", lambda x: int(target[3]))
    q, k, v = torch.empty(8, 1370, 3, 6, 64, dtype=torch.bfloat16, device="meta").permute(2, 0, 3, 1, 4).unbind(0)
    tiles.attention(q, k, v, 0.125, tiles.Settings(16, 343, 1, (37, 37), (8, 8)))
    assert [launch.kernel.__name__ for launch in found] == [
        "_cluster", "_average", "_average", "_score", "_choose", "_attend", "_attend"
    ]  # fmt: skip
    for launch in found[:2] + found[3:]:
        made, (registers, shared) = aot.compiled(launch, target), LIMITS[launch.kernel.__name__]
        assert made.spills == 0 and made.registers <= registers and made.shared <= shared, (launch.kernel, made)
        assert made.tensor_cores or launch.kernel.__name__ in ("_choose", "_cluster")  # whose products are float32
