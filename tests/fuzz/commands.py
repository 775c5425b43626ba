"""Command lines: options and values drawn from good and odd ones, run in this process, some in one of their own."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fuzz.harness import EXPORT, SECONDS, Case, Fault, command
from helpers.image_folders import class_folders
from sparsify.cli.app import app
from sparsify.errors import SparsifyError
from sparsify.recipe import recipe_names

SUITE, MANY = 30, 500

ODD = (
    "",
    "-",
    "--",
    "0",
    "1",
    "-1",
    "0.5",
    "1.5",
    "nan",
    "inf",
    "1e999",
    "9" * 4000,
    "x",
    "1,2",
    "0.5,0.5,0.5,0.5",
    "0.1,dense,1,0",
    "1,1,1,0.5",
    "2x2",
    "0x0",
    "²",
    "dense",
    "none",
    "all",
    "float16",
    "cpu",
    "xla",
    "cuda",
    "reference",
    "evit",
    "a" * 4000,
    "a/" * 2000,
    "\x1b]0;x\x07\x1b[2J",
    "\udce9",
    "a\u202eb",
    "a\nb",
    "seed=3",
    "sparsity.keep=[[[[",
    "stages.0=!!int x",
    "hf-hub:a/b",
    "hf-hub:\x1b",
    "local-dir:.",
    "a/b",
    "torch/x:.",
    "/dev/null",
    "/dev/full",
    "/nowhere/x",
    "/dev/zero/x",
    ".",
)
FITTING = {  # values that an option often gets, so that others are reached
    "--calib-images": ("1", "2"),
    "--batch-size": ("1", "3"),
    "--limit": ("1", "2"),
    "--workers": ("0",),
    "--img-size": ("28", "29", "56", "1"),
    "--num-classes": ("0", "10"),
    "--device": ("cpu",),
    "--dtype": ("float32", "bfloat16"),
    "--backend": ("auto", "reference", "cpu"),
    "--dense": ("digits",),
    "--keep": ("0.1", "dense", "0.2,dense,0.1,1"),
    "--token-keep": ("0.5", "1,0.5,1,0.5"),
    "--token-stages": ("2", "2,3"),
    "--recipe": ("calibrate", "paper-calibrated"),
    "--set": ("seed=3", "sparsity.tail=mean"),
    "--tail": ("none", "mean"),
    "--rank": ("8", "8,8,8,8"),
    "--layer": ("1", "all"),
    "--head": ("1", "all"),
    "--query": ("3,3", "0.5,0.5"),
    "--format": ("pt2",),
    "--count-as": ("paper",),
    "--targets": ("none",),
    "--keeps": ("0.1",),
    "--predictor": ("head-lowrank", "token-lowrank"),
}
ALWAYS: dict[str, tuple[str, ...]] = {  # what keeps a command short
    "convert": ("--calib-images", "2"),
    "eval": ("--data", "images"),
    "profile": ("--no-measure",),
    "push": ("--dry-run",),
    "show": ("--layer", "1", "--head", "1", "--query", "3,3"),
    "report": ("--layer", "1", "--head", "1", "--query", "3,3"),
    "sweep": ("--data", "digits", "--limit", "2", "--targets", "none", "--keeps", "0.1", "--batch-size", "0"),
    "export": ("--batch-size", "0"),
    "build-kernels": ("--x",),
}
NEVER = {"--debug", "--measure", "--force", "--workers", "--help", "--batch-size", "--micro-batch", "--save-minutes"}


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Endless; see `fuzz.harness`."""
    rng, commands = random.Random(seed), typer.main.get_command(app).commands  # type: ignore[attr-defined]
    _prepared(folder)
    for number in range(sys.maxsize):
        name = rng.choice(sorted(commands))
        arguments = _drawn(rng, name, commands[name])
        own_process = number % 50 == 49

        def run(arguments: list[str] = arguments, own_process: bool = own_process) -> None:
            for each in (path for path in folder.iterdir() if path.name != "kept"):
                each.unlink() if each.is_file() or each.is_symlink() else shutil.rmtree(each)
            shutil.copytree(folder / "kept", folder, dirs_exist_ok=True)
            before = Path.cwd()
            os.chdir(folder)
            try:
                _own_process(arguments) if own_process else command(*arguments)
            finally:
                os.chdir(before)

        yield Case(name, repr([each[:40] for each in arguments]), run, EXPORT if name == "export" else SECONDS)


def _prepared(folder: Path) -> None:
    """A model, images by class, a broken file and a recipe, which every case finds as they were."""
    kept = folder / "kept"
    kept.mkdir()
    class_folders(kept / "images", "0123456789", 1)
    shutil.copy(next(kept.glob("images/*/*")), kept / "image.png")
    command("convert", "digits", "--calib-images", "1", "--quiet", "-o", kept / "model.safetensors")
    (kept / "broken.safetensors").write_bytes(b"\x10" + bytes(40))
    (kept / "own.yaml").write_text("sparsity: {keep: 0.2}\nseed: [3\n")


def _drawn(rng: random.Random, name: str, description: Any) -> list[str]:
    """The arguments of a command line."""
    given = [name]
    if name == "models":  # without a pattern every architecture is built
        return [*given, rng.choice(("digits", "deit_t*", "[", "[!a", "\x1b]0;x\x07", "\udce9", "a" * 4000, "nothing"))]
    for param in description.params:
        if param.param_type_name == "argument" and name != "recipes":
            given.append(_positional(rng, name, param.name))
        elif param.param_type_name == "argument":
            given += [rng.choice(("show", "show", *recipe_names(), *ODD))] if rng.random() < 0.7 else []
        elif not set(param.opts) & NEVER and rng.random() < 0.1:
            option = rng.choice(param.opts)
            given += [option] if getattr(param, "is_flag", False) else [option, _value(rng, param.opts)]
    given += ALWAYS.get(name, ()) if rng.random() < 0.95 or name in ("sweep", "push", "profile") else ()
    return given


def _positional(rng: random.Random, command: str, param: str | None) -> str:
    if rng.random() < 0.3:
        return rng.choice((*ODD, "broken.safetensors", "images"))
    if param in ("images", "more_images"):
        return "image.png"
    if param == "repo":
        return "a/b"
    return "digits" if command in ("convert", "sweep") else "model.safetensors"


def _value(rng: random.Random, options: list[str]) -> str:
    fitting = [value for option in options for value in FITTING.get(option, ())]
    if fitting and rng.random() < 0.7:
        return rng.choice(fitting)
    return rng.choice((*ODD, "images", "image.png", "own.yaml", "broken.safetensors", "written"))


def _own_process(arguments: list[str]) -> None:
    """As `harness.command`, and as a user would."""
    done = subprocess.run([sys.executable, "-m", "sparsify", *arguments], capture_output=True, timeout=120)
    said = done.stderr.decode(errors="replace")
    if "error: unexpected " in said or "Traceback" in said or done.returncode not in (0, 1, 2):
        raise Fault(f"exit code {done.returncode}: {said[-300:]!r}")
    if done.returncode:
        raise SparsifyError(said.strip().splitlines()[-1])
