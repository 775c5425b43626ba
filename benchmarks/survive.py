"""Kills commands (SIGKILL) at random moments, again and again, and looks at what is left.

    python benchmarks/survive.py                    # a hundred kills of all commands, half an hour on two cores
    python benchmarks/survive.py --times 7          # one of each

Every command runs in a folder that already holds its outputs of an earlier run, and is killed several times in a row there:
half of the times at a moment drawn over its whole duration, half while it writes. After each kill every file under a final
name must be whole. Then the command runs to its end, and nothing may lie there that an undisturbed run does not leave.

A training (the built-in digits, two stages, a state saved after every step) starts in an empty folder and goes on with
--resume; all tensors of its file and all rows of metrics.csv but the images per second must be those of the undisturbed run.
The weights of the last step are what is written, so that the comparison cannot be met by the calibrated model. Exit code 1
where anything is wrong.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from sparsify.cli.app import main as main_of_sparsify
from sparsify.files.locks import SCRATCH
from sparsify.fit.finetune.validation import ValidationScore
from sparsify.models import checkpoint
from sparsify.ops.cpu import build

RECIPE = """
description: two short stages
sparsity: {keep: 0.1, rank: 12, spread: none}
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
TRAINING = "convert digits --data digits --recipe recipe.yaml --save-minutes 0 -o m.safetensors"
COMMANDS = {  # by name: arguments, and how many of a hundred kills
    "convert": ("convert digits --calib-images 8 --force -o m.safetensors", 15),
    "training": (TRAINING, 35),
    "export onnx": ("export given.safetensors --format onnx --force -o m.onnx", 10),
    "export pt2": ("export given.safetensors --format pt2 --force -o m.pt2", 10),
    "report": ("report given.safetensors -o r.html", 15),
    "sweep": ("sweep digits --data digits --limit 8 --calib-images 8 --targets none --keeps 0.1 -o sw", 10),
    "kernels": ("build-kernels --force", 5),
}
IN_A_ROW = 10  # kills before a run to the end
TIMEOUT = 900


@dataclass
class Count:
    """What came of the kills of one command."""

    kills: int = 0
    writing: int = 0  # of them while something was written
    halves: list[str] = field(default_factory=list)  # files under final names that are not whole
    litter: list[str] = field(default_factory=list)  # left after a run to the end
    different: int = 0  # trainings that did not end as the undisturbed one


def start(name: str, folder: Path, *more: str) -> BaseProcess:
    """The command in `folder`, started; a fork of this process, which has imported everything."""
    process = multiprocessing.get_context("fork").Process(target=_command, args=(name, folder, more))
    process.start()
    return process


def _command(name: str, folder: Path, more: tuple[str, ...]) -> None:
    os.chdir(folder)
    if name == "kernels":
        os.environ["SPARSIFY_CACHE"] = str(folder / "cache")
    ValidationScore.better_than = lambda own, other: True  # type: ignore[method-assign]
    with open(f"{folder}.log", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    main_of_sparsify([*COMMANDS[name][0].split(" "), *more])


def finish(process: BaseProcess, folder: Path) -> None:
    """Waits until it is done."""
    process.join(TIMEOUT)
    if process.exitcode != 0:
        raise SystemExit(f"a run failed ({process.exitcode}): {Path(f'{folder}.log').read_text()}")


def names(folder: Path) -> set[str]:
    """All files and folders, but for the numbered names of TensorBoard and the lock of the kernels' cache."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in found if "tfevents" not in name and name != "cache/kernels/lock"}


def writing(folder: Path) -> bool:
    """Whether something is being written."""
    return any(part.startswith((SCRATCH, build.TEMPORARY)) for name in names(folder) for part in Path(name).parts)


def is_whole(path: Path) -> bool:
    """Whether a file of that ending is complete; other files are not looked at."""
    try:
        content = path.read_bytes()
        match path.suffix:
            case ".safetensors" if path.name.startswith("state"):
                load_file(path)
            case ".safetensors":
                checkpoint.load(path)  # compares the digest
            case ".json":
                json.loads(content)
            case ".yaml":
                return bool(yaml.safe_load(content))
            case ".md":
                return content.endswith(b"\n")
            case ".html":
                return content.rstrip().endswith(b"</html>")
            case ".png":
                return b"IEND" in content[-12:]
            case ".onnx":
                import onnx

                onnx.checker.check_model(onnx.load_from_string(content))
            case ".pt2":
                torch.export.load(path)
    except Exception as error:
        print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


def halves(name: str, folder: Path) -> list[str]:
    """Files under final names that are not whole; a library without its sum is not loaded, and counts as none."""
    hidden = (SCRATCH, build.TEMPORARY)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".so"]
    paths = [path for path in paths if not any(part.startswith(hidden) for part in path.relative_to(folder).parts)]
    return [f"{name}: {path.name}" for path in paths if not is_whole(path)]


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without how fast it was."""
    path = folder / "m.run" / "metrics.csv"
    found = list(csv.DictReader(path.open())) if path.exists() else []
    return [{name: cell for name, cell in row.items() if name != "images_per_s"} for row in found]


def equal(folder: Path, other: Path) -> bool:
    """Whether two trainings came to the same."""
    one, two = (load_file(place / "m.safetensors") for place in (folder, other))
    same = one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())
    return same and rows(folder) == rows(other)


def kill(process: BaseProcess, folder: Path, after: float, aimed: bool) -> bool:
    """Kills it after that many seconds, or when it writes next; whether it wrote then."""
    begun = time.monotonic()
    while process.is_alive() and time.monotonic() - begun < (TIMEOUT if aimed else after):
        if aimed and time.monotonic() - begun > after and writing(folder):
            break
        time.sleep(0.002)
    process.kill()
    process.join()
    return writing(folder)


def survive(name: str, times: int, drawn: random.Random, base: Path) -> Count:
    """Kills one command that many times."""
    count, undisturbed = Count(), base / f"{name} undisturbed"
    shutil.copytree(base / "given", undisturbed)
    begun = time.monotonic()
    finish(start(name, undisturbed), undisturbed)
    seconds = time.monotonic() - begun
    while count.kills < times:
        folder = base / f"{name} killed"
        shutil.copytree(base / "given" if name == "training" else undisturbed, folder)
        more = ("--resume",) if name == "training" else ()
        for _ in range(min(IN_A_ROW, times - count.kills)):
            process = start(name, folder, *more)
            wrote = kill(process, folder, drawn.uniform(0, seconds), bool(count.kills % 2))
            count.halves += halves(name, folder)
            if process.exitcode != -signal.SIGKILL:  # it was done before
                break
            count.kills += 1
            count.writing += wrote
        finish(start(name, folder, *more), folder)
        count.halves += halves(name, folder)
        count.litter += sorted(names(folder) ^ names(undisturbed))
        count.different += name == "training" and not equal(folder, undisturbed)
        shutil.rmtree(folder)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(COMMANDS), help="separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)  # no threads of OpenMP may run where a process is forked
    for module in (
        "sparsify.jobs.convert",
        "sparsify.jobs.sweep",
        "sparsify.jobs.export.program",
        "sparsify.reports.page",
    ):
        importlib.import_module(module)
    chosen, drawn, wrong = options.commands.split(","), random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        (base / "given").mkdir()
        (base / "given" / "recipe.yaml").write_text(RECIPE)
        finish(start("convert", base / "given"), base / "given")
        (base / "given" / "m.safetensors").rename(base / "given" / "given.safetensors")
        for report in (base / "given").glob("m.*"):
            report.unlink()
        print("| command | kills | while writing | files half-written | left after the next run | training differs |")
        print("|---|---|---|---|---|---|", flush=True)
        for name in chosen:
            found = survive(name, max(1, round(options.times * COMMANDS[name][1] / 100)), drawn, base)
            wrong += len(found.halves) + len(found.litter) + found.different
            figures = [len(found.halves), len(found.litter), found.different if name == "training" else ""]
            print(f"| {name} | {found.kills} | {found.writing} | {' | '.join(map(str, figures))} |", flush=True)
            for line in (*found.halves, *found.litter):
                print(f"{name}: {line}", file=sys.stderr)
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
