"""What dist/ installs and does on a machine that has nothing: `make test-wheel`, after `make wheel`.

    A fresh environment with the CPU build of torch, without extras: how large it is, and how long pip took. Then, where no
    compiler can be found: the kernels that came with the wheel beside the reference; convert, profile and eval; what `show`
    says that lacks its extra. The source distribution: whether all its tests can be collected.

The first thing that does not hold ends it with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_TORCH = "--extra-index-url https://download.pytorch.org/whl/cpu"
MOST_BYTES = 1_000_000_000  # of the environment, bytecode apart
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")

COMPARE = """
import sparsify, torch
torch.set_grad_enabled(False)
from sparsify.ops.cpu import kernels
assert kernels.available() is None, kernels.available()
x = torch.randn(4, 3, 28, 28)
a, b = (sparsify.load("model.safetensors", backend=backend).eval()(x) for backend in ("cpu", "reference"))
assert torch.allclose(a, b, atol=1e-4), (a - b).abs().max()
print("kernels beside the reference, largest difference:", f"{float((a - b).abs().max()):.1e}", "on", kernels.isa())
"""


def main() -> int:
    """Runs all; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pip", default=CPU_TORCH, help="more words for 'pip install', which find the CPU build of torch"
    )
    parser.add_argument("--python", default=sys.executable, help="the Python of the environment")
    given = parser.parse_args()
    (wheel,) = (ROOT / "dist").glob("*-manylinux_*.whl")
    (source,) = (ROOT / "dist").glob("*.tar.gz")
    with tempfile.TemporaryDirectory(prefix="try-wheel-") as name:
        folder = Path(name)
        environment = folder / "environment"
        run([given.python, "-m", "venv", environment])
        began = time.perf_counter()
        run([environment / "bin" / "python", "-m", "pip", "install", "--quiet", wheel, *given.pip.split()])
        seconds = time.perf_counter() - began
        sizes = {path: path.lstat().st_size for path in environment.rglob("*")}
        compiled = sum(size for path, size in sizes.items() if path.suffix == ".pyc")
        size = sum(sizes.values()) - compiled
        print(f"{wheel.name}: installed with all it needs in {seconds:.0f} s, {size / 1e6:.0f} MB", end=" ")
        print(f"and {compiled / 1e6:.0f} MB of bytecode that pip made ('pip install --no-compile' and uv make none)")
        check(size < MOST_BYTES, f"the environment is larger than {MOST_BYTES / 1e6:.0f} MB")
        use(environment, folder / "work")
        collect(source, folder / "source")
    print("all holds")
    return 0


def use(environment: Path, work: Path) -> None:
    """The commands of a new user in `work`, with the environment alone on PATH."""
    work.mkdir()
    alone = {"PATH": str(environment / "bin"), "HOME": str(work), "SPARSIFY_CACHE": str(work / "cache")}
    found = [name for name in COMPILERS if (environment / "bin" / name).exists()]
    check(not found, f"a compiler in the environment: {found}")
    sparsify = environment / "bin" / "sparsify"
    for words in ("convert digits", "profile model.safetensors", "eval model.safetensors --data digits"):
        run([sparsify, *words.split()], cwd=work, env=alone)
    said = run([sparsify, "build-kernels"], cwd=work, env=alone, stdout=subprocess.PIPE).stdout
    check("it came with the package" in said and "site-packages" in said, said)
    run([environment / "bin" / "python", "-c", COMPARE], cwd=work, env=alone)
    check(not list((work / "cache").rglob("*.so")), "a library was compiled")
    shown = subprocess.run(
        [sparsify, "show", "model.safetensors", "0.png"], cwd=work, env=alone, capture_output=True, text=True
    )
    print(shown.stderr.strip())
    check("pip install 'sparsify-vit[report]'" in shown.stderr, "show names no extra")


def collect(source: Path, folder: Path) -> None:
    """All tests of the source distribution, by the Python that runs this, which has the extra `dev`."""
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py") if "__pycache__" not in path.parts}
    missing = {name for name in files if not (tree / name).is_file()}
    check(not missing, f"not in the source distribution: {sorted(missing)}")
    words = "-m pytest --collect-only -p no:cacheprovider".split()
    said = run(
        [sys.executable, *words], cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=subprocess.PIPE
    ).stdout
    print(f"{source.name}: {said.strip().splitlines()[-1]}")


def run(words: list[object], **how: object) -> subprocess.CompletedProcess[str]:
    """A command that must succeed."""
    done = subprocess.run([str(word) for word in words], text=True, **how)  # type: ignore[call-overload]
    check(done.returncode == 0, f"exit code {done.returncode}: {' '.join(map(str, words))}")
    return done


def check(holds: bool, otherwise: str) -> None:
    """Ends the program with one line where something does not hold."""
    if not holds:
        raise SystemExit(f"error: {otherwise}")


if __name__ == "__main__":
    sys.exit(main())
