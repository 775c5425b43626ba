"""Draw thousands of inputs of each class and print what came of them: `make fuzz`.

    python tests/fuzz/run.py [--seed N] [--first N] [--CLASS COUNT ...]

With counts only these classes run, up to case COUNT; `--first` is where they start. Every fault is printed, and makes
the exit code 1.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]  # of this checkout

from fuzz import harness  # noqa: E402
from sparsify.ops.cpu import build  # noqa: E402
from sparsify.ops.cpu import kernels as cpu  # noqa: E402


def main() -> int:
    classes = harness.classes()
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    for name in classes:
        parser.add_argument(f"--{name}", type=int)
    asked = vars(parser.parse_args())
    named = any(asked[name] is not None for name in classes)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, resource.RLIM_INFINITY))  # a bomb ends the case, not the machine
    cpu.available()  # built now, where the kernels are not
    faults, kernels = 0, build.cache_dir() / "kernels"
    for name, module in classes.items():
        count = asked[name] if named else module.MANY
        if not count:
            continue
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            os.environ["SPARSIFY_CACHE"] = _cache(Path(folder, "cache"), kernels)
            own = Path(folder, "drawn")
            own.mkdir()
            tally = harness.run(module, count, asked["seed"], own, first=asked["first"])
        print(f"{name}, seed {asked['seed']}", tally.table(), *tally.faults, "", sep="\n", flush=True)
        faults += len(tally.faults)
    return min(faults, 1)


def _cache(folder: Path, kernels: Path) -> str:
    """An empty cache but for the compiled kernels."""
    folder.mkdir()
    (folder / "kernels").symlink_to(kernels)
    return str(folder)


if __name__ == "__main__":
    raise SystemExit(main())
