"""`sparsify sweep`: one calibrated model at several keeps and targets, its figures, files and errors."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from helpers.error_lines import the_error
from sparsify.cli.app import main
from sparsify.images import datasets
from sparsify.images.digits import scans
from sparsify.images.sampling import spread
from sparsify.jobs import sweep
from sparsify.jobs.dense import DenseRequest
from sparsify.measure import evaluate, latency, passes
from sparsify.measure.latency import Timing
from sparsify.models import checkpoint
from sparsify.models.digits import network
from sparsify.nn import graft
from sparsify.recipe import load_recipe
from sparsify.reports import sweep as report

FEW = ["--data", "digits", "--limit", "48", "--calib-images", "8"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Timings of three rounds."""
    whole = latency.by_round
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "by_round", lambda runs, **how: whole(runs, **how | {"rounds": 3}))
        yield


@pytest.fixture(scope="module")
def swept(tmp_path_factory, quick):
    """A folder with the files of one sweep of digits, and what it printed."""
    folder, out = tmp_path_factory.mktemp("sweep"), io.StringIO()
    how = ["--data", "digits", "--limit", "48", "--calib-images", "32", "--targets", "0.7,0.4", "--keeps", "0.1"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as caught:
            main(["sweep", "digits", *how])
    assert caught.value.code == 0
    return folder, out.getvalue()


@pytest.fixture(scope="module")
def figures(swept):
    return json.loads((swept[0] / "sweep.json").read_text())


def small(**changes):
    """A sweep as a library call: one keep, one target, few images."""
    recipe = load_recipe("calibrate").override(calib_images=8)
    how = dict(targets=(), keeps=(0.1,)) | changes
    return sweep.sweep(DenseRequest("digits"), recipe, sweep.EvaluationImages("digits", limit=16), **how)


def test_all_files_are_written_and_the_table_fits_80_columns(swept):
    folder, out = swept
    assert sorted(p.name for p in folder.iterdir()) == ["sweep.json", "sweep.md", "sweep.png", "sweep.recipes"]
    assert sorted(p.stem for p in (folder / "sweep.recipes").iterdir()) == ["keep-0.1", "macs-0.4", "macs-0.7"]
    lines = out.splitlines()
    assert [line[:11].strip() for line in lines if line.startswith(("dense", "keep ", "target "))] == [
        "dense", "keep 0.1", "target 0.7", "target 0.4",
    ]  # fmt: skip
    table = [line for line in lines if line.startswith(("dense", "keep ", "target "))]
    assert max(map(len, table)) <= 80 and "…" not in out and "theoretical" in out.lower()
    assert lines[-1].startswith("wrote sweep.md, sweep.json, sweep.png, sweep.recipes")
    with Image.open(folder / "sweep.png") as picture:
        assert picture.width >= 1600 and picture.height < picture.width


def test_macs_are_the_targets_within_two_percent_and_add_up(figures):
    dense = figures["dense"]["macs"]
    for s in figures["settings"]:
        assert s["macs_share"] == s["macs"] / dense
        if s["kind"] == "macs":
            assert s["macs_share"] == pytest.approx(s["asked"], rel=0.02)
            assert s["tokens"][-1] < s["tokens"][0] == 197
        else:
            assert set(s["tokens"]) == {197} and len(set(s["keeps"])) > 1  # what keep 0.1 costs is spent unevenly
            # only attention differs: the whole model saves what the attention saves
            assert dense - s["macs"] == figures["dense"]["mhsa_macs"] - s["mhsa_macs"]


def test_json_has_accuracy_time_and_conditions_of_every_setting(figures):
    assert figures["images"] == 48 and figures["labelled"] and figures["model"] == "digits"
    assert {"threads", "device_name", "torch", "timm", "sparsify", "backend", "batch_size"} <= figures[
        "conditions"
    ].keys()
    for s in figures["settings"]:
        assert s["top1_change"] == pytest.approx(s["top1"] - figures["dense"]["top1"])
        assert s["top1_change"] == pytest.approx(100 * (s["images_gained"] - s["images_lost"]) / 48)
        assert 0 <= s["agreement"] <= 100 and s["kl"] > -1e-6
        assert 0 < s["latency_ms"]["p10"] <= s["latency_ms"]["median"] <= s["latency_ms"]["p90"]
        assert 0 < s["speed_p10"] <= s["speed"] <= s["speed_p90"]
    text = json.dumps(figures)
    assert "NaN" not in text and "Infinity" not in text and not figures["published"]


def test_markdown_shows_every_setting_beside_dense_and_how_to_make_it_again(swept, figures):
    text = (swept[0] / "sweep.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert any(row.startswith("| dense |") for row in rows) and "![" in text and "sweep.png" in text
    for s in figures["settings"]:
        label = ("keep " if s["kind"] == "keep" else "target ") + f"{s['asked']:g}"
        assert any(row.startswith(f"| {label} |") and f"{s['top1']:.2f}" in row for row in rows)
    assert "sparsify convert digits --recipe sweep.recipes/macs-0.4.yaml" in text and "theoretical" in text


@pytest.mark.parametrize("name", ["keep-0.1", "macs-0.4"])
def test_a_recipe_gives_the_settings_model_again(name, swept, figures, run, tmp_path):
    shutil.copytree(swept[0] / "sweep.recipes", tmp_path / "sweep.recipes")
    words = figures["convert"].split()[1:]
    code, _, err = run(*words, "--recipe", f"sweep.recipes/{name}.yaml", "-o", "again.safetensors", "-q")
    assert code == 0, err
    setting = next(s for s in figures["settings"] if s["name"] == name)
    assert json.loads(Path("again.report.json").read_text())["macs_sparse"] == setting["macs"]
    header = checkpoint.read_header(Path("again.safetensors"))
    assert header.config.model_dump(mode="json") == setting["sparsity"]
    again = checkpoint.load("again.safetensors")
    test = scans.Digits("test", datasets.transform(datasets.data_config(again)))
    drawn = [test[i] for i in spread(test.labels.tolist(), 48, 0)]
    x, y = torch.stack([image for image, _ in drawn]), torch.tensor([label for _, label in drawn])
    found = evaluate.evaluate(again, graft.dense_twin(again), [(x, y)])
    assert found.kl == pytest.approx(setting["kl"], abs=2e-6)
    assert (found.top1, found.agreement) == (setting["top1"], setting["agreement"])


def test_the_same_seed_gives_the_same_figures():
    two = [small(targets=(0.5,)) for _ in range(2)]
    for one, other in zip(*(each.settings for each in two), strict=True):
        assert one.evaluation == other.evaluation and one.choice == other.choice
        assert one.profile.macs_sparse == other.profile.macs_sparse
    assert two[0].settings[0].evaluation.images == 16


def test_another_seed_draws_other_images(monkeypatch):
    seen = []
    monkeypatch.setattr(passes, "compare", lambda dense, sparse, shown, *rest: seen.append(shown) or 1 / 0)
    for seed in (0, 0, 1):
        recipe = load_recipe("calibrate").override(calib_images=4, seed=seed)
        with pytest.raises(ZeroDivisionError):
            images = sweep.EvaluationImages("digits", limit=16, seed=seed)
            sweep.sweep(DenseRequest("digits"), recipe, images, targets=(), keeps=(0.1,))
    first, again, other = (shown.dataset.items.indices for shown in seen)
    assert first == again != other and len(set(first)) == 16


def loose(folder, n=5):
    folder.mkdir()
    for i in range(n):
        scans.Digits("test")[i][0].save(folder / f"{i}.png")


def test_loose_images_give_agreement_but_no_accuracy(run, tmp_path):
    loose(tmp_path / "flat")
    how = ["--data", "flat", "--calib-images", "4", "--targets", "none", "--keeps", "0.1,0.25"]
    code, out, err = run("sweep", "digits", *how)
    assert code == 0 and "no class folders" in err and "no class folders" not in out
    found = json.loads(Path("sweep.json").read_text())
    assert not found["labelled"] and found["images"] == 5 and found["dense"]["top1"] is None
    for s in found["settings"]:
        assert (
            s["top1"] is s["images_lost"] is s["top1_change"] is None and s["agreement"] >= 80 and s["kl"] is not None
        )
    assert "top-1" not in Path("sweep.md").read_text() and "agree" in Path("sweep.md").read_text()
    code, _, err = run("sweep", "digits", "--imagenet", "flat")
    assert code == 1 and "class folders" in err


def test_models_without_a_classifier_are_compared_by_their_features(run):
    how = ["--num-classes", "0", "--targets", "0.7", "--keeps", "0.25"]
    code, out, err = run("sweep", "digits", *FEW, *how)
    assert code == 0, err
    found = json.loads(Path("sweep.json").read_text())
    assert all(s["cosine_pooled"] > 0.9 and s["agreement"] is s["top1"] is None for s in found["settings"])
    assert "cosine" in out and Path("sweep.png").is_file()
    assert "--num-classes 0" in found["convert"]


def test_a_picture_that_cannot_be_drawn_costs_a_line_and_nothing_else(run, monkeypatch):
    def broken(sweep):
        raise RuntimeError("no fonts")

    Path("sweep.png").write_text("of an earlier sweep")
    monkeypatch.setattr(report, "plot", broken)
    code, out, err = run("sweep", "digits", *FEW, "--targets", "none", "--keeps", "0.1")
    assert code == 0 and err.count("could not draw the plot: no fonts") == 1
    assert sorted(p.name for p in Path().iterdir()) == ["sweep.json", "sweep.md", "sweep.recipes"]
    assert ".png" not in Path("sweep.md").read_text()


def test_a_target_out_of_reach_is_left_out_and_said(run):
    code, out, _ = run("sweep", "digits", *FEW, "--targets", "0.05", "--keeps", "0.1")
    assert code == 0 and "left out, target 0.05" in out
    found = json.loads(Path("sweep.json").read_text())
    assert list(found["skipped"]) == ["macs-0.05"] and [s["name"] for s in found["settings"]] == ["keep-0.1"]
    code, _, err = run("sweep", "digits", *FEW, "--targets", "0.05", "--keeps", "none", "-o", "other")
    assert code == 2 and "target 0.05" in err and not Path("other.md").exists()


def test_an_earlier_sweeps_recipes_go_and_other_files_stay(tmp_path):
    made = small()
    for name in ("keep-0.9.yaml", "mine.txt"):
        (tmp_path / "s.recipes").mkdir(exist_ok=True)
        (tmp_path / "s.recipes" / name).write_text("")
    report.write(made, tmp_path / "s")
    assert sorted(p.name for p in (tmp_path / "s.recipes").iterdir()) == ["keep-0.1.yaml", "mine.txt"]
    recipe = load_recipe(str(tmp_path / "s.recipes" / "keep-0.1.yaml"))
    assert len(recipe.sparsity.keep) == 4 and recipe == made.settings[0].recipe
    assert yaml.safe_load((tmp_path / "s.recipes" / "keep-0.1.yaml").read_text())["seed"] == 0


def test_the_picture_of_any_name_is_shown(tmp_path):
    report.write(small(), tmp_path / "a (b) & c")
    assert "](a%20%28b%29%20%26%20c.png)" in (tmp_path / "a (b) & c.md").read_text()
    assert "--recipe a (b) & c.recipes/keep-0.1.yaml" in (tmp_path / "a (b) & c.md").read_text()


def test_an_error_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    made = small()
    report.write(made, tmp_path / "s")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for error in (KeyboardInterrupt, OSError):
        monkeypatch.setattr(os, "fsync", lambda file, error=error: (_ for _ in ()).throw(error("full")))
        with pytest.raises((KeyboardInterrupt, report.BadFile), match="full"):
            report.write(made, tmp_path / "s")
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_published_points_are_deit_smalls_alone():
    made = small()
    assert report.published(made) == []
    where = dict(made.conditions) | {"img_size": [224, 224]}
    deit = replace(made, architecture="deit_small_patch16_224", classes=1000, conditions=where)
    found = {(p.model, p.token_keep, p.keep): p for p in report.published(deit)}
    # dense 4.599 G of which the attention 357.66 M; keep 0.1 has 111.37 M: 1 - 0.24629 / 4.599
    assert found["Sparsifiner", 1, 0.1].macs_share == pytest.approx(0.94645, abs=1e-4)
    assert found["Sparsifiner", 0.5, 0.25].macs_share == pytest.approx(2.22 / 4.599)
    assert found["Sparsifiner", 1, 0.1].top1 == 79.42
    assert report.published(replace(deit, labelled=False)) == [] == report.published(replace(deit, classes=10))
    assert report.plot(deit).startswith(b"\x89PNG")
    text = report.to_markdown(deit, "p", True)
    assert "fine-tuned" in text and len(report.as_dict(deit, "p")["published"]) == len(found)


def test_speed_is_taken_round_by_round(monkeypatch):
    monkeypatch.setattr(latency, "by_round", lambda runs, **how: {"dense": [4.0, 10.0, 6.0], "half": [2.0, 40.0, 2.0]})
    dense = network.build()
    times, speeds = sweep._time({"dense": dense, "half": dense}, 1, torch.device("cpu"), torch.float32)
    assert times["dense"].median == 6 and times["half"].runs == 3
    assert speeds["half"].median == 2  # of 4/2, 10/40, 6/2
    assert speeds["dense"] == Timing(1, 1, 1, 3)


BAD = {  # arguments, exit code, words of the one line
    "target 0": (["digits", *FEW, "--targets", "0.5,0"], 2, "--targets 0.5,0"),
    "target above 1": (["digits", *FEW, "--targets", "1.2"], 2, "--targets 1.2"),
    "target word": (["digits", *FEW, "--targets", "half"], 2, "--targets half"),
    "target nan": (["digits", *FEW, "--targets", "nan"], 2, "--targets nan"),
    "target empty": (["digits", *FEW, "--targets", "0.5,,"], 2, "--targets"),
    "keep 0": (["digits", *FEW, "--keeps", "0"], 2, "--keeps 0"),
    "keep dense": (["digits", *FEW, "--keeps", "dense"], 2, "--keeps dense"),
    "nothing": (["digits", *FEW, "--keeps", "none", "--targets", "none"], 2, "nothing to measure"),
    "no data": (["digits"], 2, "--data"),
    "data twice": (["digits", "--data", "digits", "--imagenet", "val"], 2, "--imagenet"),
    "limit 0": (["digits", "--data", "digits", "--limit", "0"], 2, "--limit"),
    "unknown model": (["deit_smal", *FEW], 2, "deit_small"),
    "a file": (["model.safetensors", *FEW], 2, "dense model"),
    "folder missing": (["digits", "--data", "none"], 1, "none"),
    "calibration missing": (["digits", *FEW, "--calib", "none"], 1, "none"),
    "weights missing": (["deit_tiny", "--data", "digits", "--weights", "none.pth"], 1, "none.pth"),
    "other classes": (["digits", "--data", "three"], 1, "3 classes"),
    "output": (["digits", *FEW, "-o", "none/s"], 1, "none/s.md"),
    "output in the way": (["digits", *FEW, "-o", "three"], 1, "three.recipes"),
    "backend": (["digits", *FEW, "--backend", "magic"], 2, "magic"),
    "dtype": (["digits", *FEW, "--dtype", "int3"], 2, "int3"),
    "device": (["digits", *FEW, "--device", "abacus"], 2, "abacus"),
    "swin": (["swin_tiny_patch4_window7_224", *FEW], 1, "WindowAttention"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_an_exit_code(kind, run, tmp_path):
    (tmp_path / "three").mkdir()
    for name in "abc":
        loose(tmp_path / "three" / name, 1)
    (tmp_path / "three.recipes").write_text("")
    before = sorted(p.name for p in tmp_path.iterdir())
    arguments, expected, words = BAD[kind]
    code, _, err = run("sweep", *arguments)
    assert code == expected, err
    assert words in the_error(err)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_bad_shares_are_refused_before_torch_is_imported():
    probe = "import sys\nfrom sparsify.cli.app import main\n"
    probe += "try: main(['sweep', 'digits', '--data', 'digits', '--targets', '2'])\nexcept SystemExit: pass\n"
    probe += "print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


def test_a_converted_file_is_refused_with_the_name_of_its_dense_model(run):
    assert run("convert", "digits", "--calib-images", 2, "-q")[0] == 0
    code, _, err = run("sweep", "model.safetensors", *FEW)
    assert code == 2 and "dense model" in err and "such as digits" in err


def test_ctrl_c_leaves_nothing_and_says_so(ctrl_c, tmp_path):
    assert ctrl_c("sweep", "digits", "--data", "digits") == (130, "error: interrupted; nothing half-written is left")
    assert not list(tmp_path.iterdir())


def test_help_fits_80_columns(run):
    code, out, _ = run("sweep", "--help")
    assert code == 0 and "--targets" in out and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("ema, word", [(True, ("--ema",)), (False, ("--no-ema",)), (None, ())])
def test_the_printed_command_takes_the_same_weights(ema, word):
    assert sweep._command(DenseRequest("digits", ema=ema), None, "float32")[3:] == word
