"""What a person types and sees: exit codes, one-line errors, files written."""

import csv
import json
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from helpers.error_lines import the_error
from helpers.image_folders import class_folders
from sparsify.cli.app import main
from sparsify.measure import latency
from sparsify.ops import backends


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model.safetensors"
    with pytest.raises(SystemExit) as caught:
        main(["convert", "digits", "--calib-images", "16", "-o", str(path), "--quiet"])
    assert caught.value.code == 0
    return path


def test_convert_writes_model_and_reports(run, tmp_path):
    code, out, err = run("convert", "digits", "--calib-images", 8, "--keep", 0.1)
    assert code == 0 and "wrote model.safetensors" in out and "theoretical" in out.lower()
    assert "digits of the training split, because --data was not given" in err and "digits" not in out.lower()
    report = json.loads((tmp_path / "model.report.json").read_text())
    assert report["mhsa_macs_sparse"] == sum(report[f"{p}_macs"] for p in ("kept", "prefix", "predictor", "tail"))
    assert "MHSA" in (tmp_path / "model.report.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.report.json", "model.report.md", "model.safetensors"]


def test_alias_says_what_it_resolved_to(run, tmp_path):
    tiny = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    save_file(tiny.state_dict(), tmp_path / "own.safetensors")
    code, _, err = run("convert", "deit_tiny", "--weights", "own.safetensors", "--calib-images", 2)
    assert code == 0 and "deit_tiny_patch16_224" in err and "10 classes instead of 1000" in err


def test_profile_prints_dense_beside_sparse_and_says_which_is_faster(run, converted):
    code, out, _ = run("profile", converted, "--json", "p.json", "--markdown", "p.md", "--tree")
    assert code == 0 and "theoretical" in out.lower() and "measured" in out.lower() and "predictor" in out
    figures = json.loads(open("p.json").read())
    assert figures["latency_ms_dense"] > 0 and figures["backend"].startswith(("cpu (", "reference ("))
    assert sum(len(choice["blocks"]) for choice in figures["choices"]) == 4 and "backend=auto" in out
    slower = figures["latency_ms_sparse_p10"] > figures["latency_ms_dense_p90"]
    assert ("slower" in out) or not slower
    assert open("p.md").read().startswith("#")


def test_eval_on_digits_writes_timms_columns(run, converted):
    code, out, _ = run("eval", converted, "--data", "digits", "--results-file", "r.csv")
    assert code == 0 and "agreement" in out.lower()
    (row,) = list(csv.DictReader(open("r.csv")))
    timm_columns = [
        "model",
        "top1",
        "top1_err",
        "top5",
        "top5_err",
        "param_count",
        "img_size",
        "crop_pct",
        "interpolation",
    ]
    assert list(row)[: len(timm_columns)] == timm_columns
    assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
    assert float(row["dense_top1"]) > 95 and float(row["agreement"]) > 95
    assert int(row["images"]) >= 500 and {"kl", "images_lost", "images_gained", "dense_top5"} <= row.keys()


@pytest.fixture
def quick(monkeypatch):
    """Profiles of two rounds."""
    whole = latency.interleaved
    monkeypatch.setattr(latency, "interleaved", lambda runs, **how: whole(runs, **how | {"rounds": 2}))


def test_without_kernels_one_line_says_why_and_the_reference_computes(run, converted, quick, monkeypatch):
    monkeypatch.setattr(backends, "not_built", lambda: "no C++ compiler was found")
    for command, how in (("profile", ["--batch-size", 1]), ("eval", ["--data", "digits"])):
        code, out, err = run(command, converted, *how)
        assert (
            code == 0 and "error" not in err and " ".join((out + err).split()).count("no C++ compiler was found") == 1
        )
        code, out, err = run(command, converted, *how, "--backend", "cpu")
        assert code == 2 and the_error(err) and not out
        assert "'cpu'" in err and "no C++ compiler was found" in err and "'auto' or 'reference'" in err
    code, _, err = run("convert", "digits", "--calib-images", 2)
    assert code == 0 and err.count("no C++ compiler was found") == 1
    code, _, err = run("convert", "digits", "--calib-images", 2, "--force", "--backend", "reference")
    assert code == 0 and "compiler" not in err
    code, _, err = run("convert", "digits", "--calib-images", 2, "--force", "--backend", "cpu")
    assert code == 2 and "no C++ compiler was found" in err


def test_backend_and_precision_reach_the_job(run, converted, quick):
    code, out, _ = run("profile", converted, "--backend", "reference", "--json", "p.json")
    assert code == 0 and json.loads(open("p.json").read())["backend"] == "reference"
    code, out, _ = run("profile", converted, "--kernel-precision", "bf16", "--json", "p.json")
    choices = json.loads(open("p.json").read())["choices"]
    assert code == 0 and {choice["shape"]["precision"] for choice in choices} == {"bf16"}


def test_models_and_recipes_are_listed(run):
    code, out, _ = run("models", "deit_tiny")
    assert code == 0 and "deit_tiny_patch16_224" in out
    code, out, _ = run("recipes")
    assert code == 0 and out.splitlines()[0].startswith("calibrate  ")
    code, out, _ = run("recipes", "show", "calibrate")
    assert code == 0 and "head-lowrank" in out


BAD = {  # arguments, exit code, words of the one line
    "unknown model": (["convert", "deit_smal"], 2, "deit_small"),
    "swin": (["convert", "swin_tiny_patch4_window7_224"], 1, "WindowAttention"),
    "keep 0": (["convert", "digits", "--keep", "0"], 2, "keep"),
    "keep 1.5": (["convert", "digits", "--keep", "1.5"], 2, "keep"),
    "keep nan": (["convert", "digits", "--keep", "nan"], 2, "keep"),
    "keep -1": (["convert", "digits", "--keep", "-1"], 2, "keep"),
    "keep word": (["convert", "digits", "--keep", "few"], 2, "--keep few"),
    "keep list": (["convert", "digits", "--keep", "0.1,0.2"], 2, "4 blocks"),
    "rank": (["convert", "digits", "--rank", "65"], 2, "head size 64"),
    "rank word": (["convert", "digits", "--rank", "x"], 2, "--rank x"),
    "tail": (["convert", "digits", "--tail", "cell"], 2, "tail"),
    "cells": (["convert", "digits", "--cells", "4by4"], 2, "--cells 4by4"),
    "recipe": (["convert", "digits", "--recipe", "none"], 2, "calibrate"),
    "weights missing": (["convert", "deit_tiny", "--weights", "none.pth"], 1, "none.pth"),
    "other architecture": (["convert", "deit_tiny", "--weights", "vit.safetensors"], 1, "vit.safetensors"),
    "calibration folder missing": (["convert", "digits", "--data", "none"], 1, "none"),
    "calibration folder empty": (["convert", "digits", "--data", "empty"], 1, "empty"),
    "profile: no file": (["profile"], 1, "model.safetensors"),
    "profile: text": (["profile", "text.safetensors"], 1, "text.safetensors"),
    "profile: plain checkpoint": (["profile", "vit.safetensors"], 1, "--weights"),
    "profile: dtype": (["profile", "--dtype", "int3"], 2, "int3"),
    "profile: backend": (["profile", "--backend", "magic"], 2, "magic"),
    "profile: precision": (["profile", "--kernel-precision", "int4"], 2, "int4"),
    "eval: precision": (["eval", "MODEL", "--data", "digits", "--kernel-precision", "int4"], 2, "int4"),
    "profile: device": (["profile", "--device", "abacus"], 2, "abacus"),
    "eval: nothing given": (["eval", "MODEL"], 2, "--imagenet"),
    "eval: no folder": (["eval", "MODEL", "--imagenet", "none"], 1, "none"),
    "eval: empty": (["eval", "MODEL", "--imagenet", "empty"], 1, "empty"),
    "eval: no class folders": (["eval", "MODEL", "--imagenet", "flat"], 1, "class folders"),
    "eval: other classes": (["eval", "MODEL", "--imagenet", "three"], 1, "3 classes"),
    "eval: results file": (["eval", "MODEL", "--data", "digits", "--results-file", "r.txt"], 2, ".csv or .json"),
    "output folder": (
        ["convert", "digits", "--calib-images", "2", "-o", "none/m.safetensors"],
        1,
        "none/m.safetensors",
    ),
    "unknown option": (["convert", "digits", "--kepe", "0.1"], 2, "--kepe"),
    "unknown command": (["convrt"], 2, "convrt"),
    "no name": (["convert"], 2, "NAME"),
    "no such listing": (["models", "no_such_model"], 2, "no_such_model"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_an_exit_code(kind, run, converted, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("hello")
    class_folders(tmp_path / "flat", ["."]) if (tmp_path / "flat").mkdir() else None
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    class_folders(tmp_path / "three", ["a", "b", "c"])
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=1, img_size=32)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    arguments, expected, words = BAD[kind]
    code, out, err = run(*[str(converted) if a == "MODEL" else a for a in arguments])
    assert code == expected, err
    assert words in the_error(err)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_another_models_file_is_kept_without_force(run, converted, tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    code, _, err = run("convert", "digits", "--calib-images", 2)
    assert code == 1 and "--force" in err and (tmp_path / "model.safetensors").read_text() == "mine"


def test_debug_shows_the_traceback(run):
    code, _, err = run("profile", "none.safetensors", "--debug")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("error: ")


def test_ctrl_c_leaves_nothing_and_says_so(ctrl_c, tmp_path):
    assert ctrl_c("convert", "digits") == (130, "error: interrupted; nothing half-written is left")
    assert not list(tmp_path.iterdir())


def test_help_does_not_import_torch_and_the_three_entry_points_agree():
    probe = "import sys\nfrom sparsify.cli.app import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    probe += "print('torch' in sys.modules, 'pydantic' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False False"
    versions = {
        subprocess.run([sys.executable, *how, "--version"], capture_output=True, text=True, check=True).stdout
        for how in (["-m", "sparsify"], ["-c", "from sparsify.cli.app import main; main()"])
    }
    assert len(versions) == 1


@pytest.mark.parametrize("command", ["convert", "profile", "eval", "models", "recipes"])
def test_every_option_has_a_help_text(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    options = [line for line in out.splitlines() if line.startswith("  -")]
    assert options and max(map(len, out.splitlines())) <= 80


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is there")
@pytest.mark.parametrize(
    "words",
    [
        ("convert", "digits", "--calib-images", 2),
        ("profile", "FILE"),
        ("eval", "FILE", "--data", "digits"),
        ("show", "FILE", "x.png"),
        ("report", "FILE", "--images", "x.png"),
        ("sweep", "digits", "--data", "digits"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_in_one_line(run, converted, words):
    code, out, err = run(*(converted if word == "FILE" else word for word in words), "--device", "cuda")
    assert code == 2 and the_error(err) and not out
    assert "--device cuda cannot be used here; this machine has cpu" in " ".join(err.split())
