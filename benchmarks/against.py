"""The speed of this checkout against another one's, in one interleaved run: `make bench-against OLD=DIR`.

    python benchmarks/against.py --old DIR [--rounds 40] [--threads 2] [--model deit_small]

The other checkout converts a DeiT-Small (random weights), or with `--model digits` the built-in one. Each checkout gets a
process of its own, which loads that file; the outputs of the two must be equal to the bit. They take turns call by call;
printed are the median of the ratio new / old by round, its quartiles, and the ratio of the two medians. Timed are whole
models at batch 1, in float32 and bfloat16, one sparse attention call at 197 tokens, `import sparsify` and `sparsify --help`.
DIR needs nothing but its source; both run under this Python.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import conditions, start

ROOT = Path(__file__).resolve().parents[1]
CALLS = {"model, float32": 2, "model, bfloat16": 2, "attention, float32": 100, "attention, bfloat16": 100}
PROGRAMS = {"import sparsify": ["-c", "import sparsify"], "sparsify --help": ["-m", "sparsify", "--help"]}
WORKER = """
import hashlib, sys, time, torch, sparsify
torch.set_num_threads(int(sys.argv[2]))
runs = {}
with torch.inference_mode():
    for dtype in (torch.float32, torch.bfloat16):
        model = sparsify.load(sys.argv[1], backend="cpu").to(dtype)
        x = torch.randn(1, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
        attention, name = model.blocks[len(model.blocks) // 2 - 1].attn, str(dtype).removeprefix("torch.")
        tokens = torch.randn(model.pos_embed.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        q, k, v = attention.qkv_heads(tokens)
        runs["model, " + name] = lambda model=model, x=x.to(dtype): model(x)
        runs["attention, " + name] = lambda a=attention, q=q, k=k, v=v: a.attend(q, k, v, None, None)
    for run in runs.values():
        for _ in range(5):
            run()
    outputs = b"".join(run().float().numpy().tobytes() for run in runs.values())
    print(hashlib.sha256(outputs).hexdigest(), flush=True)
    for line in sys.stdin:
        name, _, count = line.strip().rpartition(" ")
        begin = time.perf_counter()
        for _ in range(int(count)):
            runs[name]()
        print(time.perf_counter() - begin, flush=True)
"""


class Worker:
    """A checkout's process, which times what it is asked for."""

    def __init__(self, root: Path, file: Path, threads: int) -> None:
        command = [sys.executable, "-W", "ignore", "-c", WORKER, str(file), str(threads)]
        # Threads that wait must not spin: the other process needs the cores.
        pipe, environment = subprocess.PIPE, os.environ | {"PYTHONPATH": str(root), "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root, env=environment)
        self.outputs = self.read()  # of all that is timed, a digest

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def time(self, name: str) -> float:
        """Seconds of `CALLS[name]` calls."""
        assert self.process.stdin is not None
        print(f"{name} {CALLS[name]}", file=self.process.stdin, flush=True)
        return float(self.read())


def program(root: Path, arguments: list[str]) -> float:
    """Seconds of a Python program with the package of a checkout."""
    begin = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, *arguments], cwd=root, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def ratios(old: list[float], new: list[float]) -> str:
    """Median of new / old by round, its quartiles, and the ratio of the two medians."""
    found = [n / o for o, n in zip(old, new, strict=True)]
    low, middle, high = statistics.quantiles(found, n=4)
    return f"{middle:.4f} | {low:.4f} to {high:.4f} | {statistics.median(new) / statistics.median(old):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=("deit_small", "digits"), default="deit_small")
    arguments = parser.parse_args()
    start(arguments)
    with tempfile.TemporaryDirectory() as folder:
        import timm
        from safetensors.torch import save_file

        weights, file = Path(folder) / "dense.safetensors", Path(folder) / "model.safetensors"
        how = f"{arguments.model!r}, keep=0.1, calib_images=16, output={str(file)!r}"
        if arguments.model != "digits":
            save_file(timm.create_model("deit_small_patch16_224").state_dict(), weights)
            how += f", weights={str(weights)!r}"
        program(arguments.old.resolve(), ["-W", "ignore", "-c", f"import sparsify; sparsify.convert({how})"])
        workers = [Worker(root, file, arguments.threads) for root in (arguments.old.resolve(), ROOT)]
        if workers[0].outputs != workers[1].outputs:
            raise SystemExit("the two checkouts compute different outputs from one file")
        print(f"a file of the old checkout: equal outputs\n\n{conditions(arguments)}\n")
        print("| | new / old, median | quartiles | of medians |\n|---|---|---|---|")
        for name in CALLS:
            times: list[list[float]] = [[], []]
            for i in range(arguments.rounds):
                for j in (0, 1) if i % 2 else (1, 0):
                    times[j].append(workers[j].time(name))
            print(f"| {name} | {ratios(*times)} |", flush=True)
        for worker in workers:
            worker.process.kill()
        for name, words in PROGRAMS.items():
            times = [[], []]
            for i in range(min(arguments.rounds, max(7, arguments.rounds // 4))):
                for j in (0, 1) if i % 2 else (1, 0):
                    times[j].append(program((arguments.old.resolve(), ROOT)[j], words))
            print(f"| {name} | {ratios(*times)} |", flush=True)


if __name__ == "__main__":
    main()
