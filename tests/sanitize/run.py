"""Compile the kernels with the address and undefined-behaviour sanitizers, and run `main.cpp` on them: `make sanitize`.

    python tests/sanitize/run.py [CALLS [FIRST SEED]]

Leaves nothing behind; ends with 1 at the first finding, which the sanitizers describe.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sparsify.ops.cpu import build

DRIVER = Path(__file__).parent / "main.cpp"
CHECKS = "-fsanitize=address,undefined,float-cast-overflow"
FLAGS = [CHECKS, "-fno-sanitize-recover=all", "-O1", "-g", "-fno-omit-frame-pointer", f"-I{build.SOURCES}"]


def main(arguments: list[str]) -> int:
    compiler = build.find_compiler()
    if not compiler:
        print("no C++ compiler was found: install g++ 10 or newer, or set CXX", file=sys.stderr)
        return 1
    kernels = sorted(build.SOURCES.glob("kernel_*.cpp"), reverse=True)  # the longest first
    with tempfile.TemporaryDirectory(prefix="sanitize-") as name:
        folder = Path(name)
        compiling = build.commands([*kernels, DRIVER], folder, FLAGS, compiler)[:-1]  # the last one links a library
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            if any(pool.map(subprocess.call, compiling)):
                return 1
        objects = [command[-1] for command in compiling]
        if subprocess.call([*compiler, CHECKS, *objects, "-o", str(folder / "sanitized")]):
            return 1
        settings = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        return min(1, abs(subprocess.call([str(folder / "sanitized"), *arguments], env=os.environ | settings)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
