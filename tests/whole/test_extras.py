"""Without the packages of any extra: the main job runs, and a command that needs one names it in one line."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sparsify.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

RUNS = {
    "convert": "convert digits --keep 0.5 -o d.safetensors",
    "profile": "profile d.safetensors --markdown p.md",
    "eval": "eval d.safetensors --data digits --results-file e.json",
    "report": "report d.safetensors --eval e.json -o page.html",
    "pt2": "export d.safetensors --format pt2 --no-measure",
    "models": "models",
    "recipes": "recipes",
}
REFUSALS = {
    "convert digits --data digits -o f.safetensors": (
        "fine-tuning (--calibrate-only leaves it out) needs accelerate: pip install 'sparsify-vit[train]'"
    ),
    "show d.safetensors 0.png": "a picture needs matplotlib: pip install 'sparsify-vit[report]'",
    "report d.safetensors --images 0.png": "a picture needs matplotlib: pip install 'sparsify-vit[report]'",
    "export d.safetensors --format onnx": "--format onnx needs onnx: pip install 'sparsify-vit[export]'",
    "export d.safetensors --format openvino": "--format openvino needs openvino: pip install 'sparsify-vit[openvino]'",
    "profile d.safetensors --against onnxruntime": "onnx is not installed: pip install 'sparsify-vit[export]'",
    "profile d.safetensors --against openvino": "openvino is not installed: pip install 'sparsify-vit[openvino]'",
}
IN_TWO = "a command in 2 processes needs accelerate: pip install 'sparsify-vit[train]'"

SCRIPT = """
import contextlib, io, json, os, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))  # importing one of them fails
from sparsify.cli.app import main

def run(line):
    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
        try:
            main(line.split())
        except SystemExit as end:
            return end.code or 0, printed.getvalue()
    return 0, printed.getvalue()

found = {line: run(line) for line in json.loads(sys.argv[2])}
from sparsify.fit.finetune.log import TrainingLog
from pathlib import Path
said = []
with TrainingLog(Path("run"), ["a"], None, said.append) as log:
    log.write_validation(dict(step=0, stage=0, weights="start", agreement=1.0))
found["log"] = said
os.environ.update(RANK="0", WORLD_SIZE="2")
found["two"] = run("eval d.safetensors --data digits")
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Exit code and stderr of every command, run in this order in one Python that has none of the extras' packages."""
    folder = tmp_path_factory.mktemp("bare")
    absent = [name for packages in EXTRAS.values() for name in packages]
    words = [json.dumps(absent), json.dumps([*RUNS.values(), *REFUSALS])]
    subprocess.run([sys.executable, "-c", SCRIPT, *words], cwd=folder, check=True, timeout=300)
    return json.loads((folder / "found.json").read_text()) | {"folder": folder}


@pytest.mark.parametrize("name", RUNS)
def test_the_main_job_needs_no_extra(found, name):
    code, printed = found[RUNS[name]]
    assert code == 0, printed


def test_reports_are_whole_without_them(found):
    folder = found["folder"]
    assert {"d.safetensors", "d.report.md", "d.report.json", "p.md", "e.json", "page.html"} <= {
        path.name for path in folder.iterdir()
    }


@pytest.mark.parametrize("command", REFUSALS)
def test_a_command_that_needs_one_names_it(found, command):
    code, printed = found[command]
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 1 and errors == [f"error: {REFUSALS[command]}"], printed
    assert not (found["folder"] / "f.safetensors").exists()


def test_several_processes_need_one(found):
    code, printed = found["two"]
    assert code == 1 and printed.splitlines()[-1] == f"error: {IN_TWO}"


def test_a_log_without_them_is_csv_files_and_two_lines(found):
    board, picture = found["log"]
    assert "the log needs tensorboard: pip install 'sparsify-vit[train]'" in board
    assert "a plot needs matplotlib: pip install 'sparsify-vit[report]'" in picture
    assert (found["folder"] / "run" / "validation.csv").is_file()


def test_pyproject_has_these_extras_and_all_of_them_together():
    extras = {name: {_name(text) for text in texts} for name, texts in SETTINGS["optional-dependencies"].items()}
    assert {name: set(packages) for name, packages in EXTRAS.items()} == {name: extras[name] for name in EXTRAS}
    assert extras["all"] == {f"sparsify-vit[{','.join(EXTRAS)}]"}
    assert any(text.startswith("sparsify-vit[all") for text in extras["dev"])
    assert not {_name(text) for text in SETTINGS["dependencies"]} & set().union(*EXTRAS.values())


def test_every_dependency_is_explained():
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    texts = [*SETTINGS["dependencies"], *(t for texts in SETTINGS["optional-dependencies"].values() for t in texts)]
    names = {_name(text) for text in texts if "sparsify-vit" not in text}
    assert {name for name in names if not re.search(rf"\b{re.escape(name)}\b", page)} == set()


def _name(text):
    """'torch>=2.10' -> torch; 'mkdocstrings[python]' -> mkdocstrings. Extras of this distribution stay as they are."""
    name = re.split(r"[<>=!~; ]", text)[0]
    return name if name.startswith("sparsify-vit") else name.partition("[")[0]
