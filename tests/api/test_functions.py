"""`sparsify.sweep`, `show`, `report` and `push`: the commands of these names as functions."""

import json

import pytest
import torch
from PIL import Image

import sparsify
from sparsify.errors import BadData, BadFile, SparsifyError, UsageError
from sparsify.measure import latency
from sparsify.models import names, pretrained
from sparsify.models.checkpoint import read_header

FEW = {"calib_images": 4, "limit": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "digits.safetensors"
    return sparsify.convert("digits", keep=0.2, output=path, calib_images=4, spread="none")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "cat.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Timings of three rounds."""
    whole = latency.interleaved
    monkeypatch.setattr(latency, "interleaved", lambda runs, **how: whole(runs, **how | {"rounds": 3}))


# ---- sweep ----


def test_sweep_of_a_name_gives_figures_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = []
    found = sparsify.sweep("digits", "digits", targets=(), keeps=(0.1,), progress=lambda *s: steps.append(s), **FEW)
    assert [s.choice.name for s in found.settings] == ["keep-0.1"] and list(tmp_path.iterdir()) == []
    assert found.labelled and found.settings[0].evaluation.images == 16 and ("eval", 16, 16) in steps


def test_sweep_of_a_module_calibrates_on_tensors_and_writes_its_files(tmp_path):
    module, images = pretrained.load(names.resolve("digits")), torch.rand(6, 3, 28, 28) * 2 - 1
    how = dict(targets=(), keeps=(0.1,), calib=images, no_labels=True, output=tmp_path / "mine")
    found = sparsify.sweep(module, "digits", **how, **FEW)
    assert found.calibration == "the first 4 images of --calib, given as tensors"
    assert not found.labelled and found.settings[0].evaluation.top1 is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "mine.md", "mine.png", "mine.recipes"]
    assert json.loads((tmp_path / "mine.json").read_text())["convert"] == "sparsify convert NAME"


def test_sweep_refuses_what_it_does_not_know():
    for wrong, words in (({"keap": 1}, "keap"), ({"limit": 0}, "limit 0"), ({"calib": torch.zeros(2)}, "calib gives")):
        with pytest.raises(SparsifyError, match=words):
            sparsify.sweep("digits", "digits", targets=(), keeps=(0.1,), **{**FEW, **wrong})


# ---- show ----


def test_show_gives_pictures_of_a_file_and_of_its_model(made, photo, tmp_path):
    how = dict(queries=[(0.5, 0.5), (9, 3)], layers=(1, 4), heads="all")
    shown = sparsify.show(made.path, photo, **how)
    assert list(shown.files) == ["cat.keys-1.png", "cat.keys-2.png", "cat.mass.png"] and shown.paths == ()
    assert all(png.startswith(b"\x89PNG") for png in shown.files.values())
    assert shown.shown[0].layers == (0, 3) and shown.shown[0].heads == (0, 1)
    model = made.model.to(torch.bfloat16).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    again = sparsify.show(model, [photo], tmp_path / "pictures", **how)
    assert [path.read_bytes() for path in again.paths] == list(again.files.values()) and len(again.paths) == 3
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    made.model.float().eval()


def test_show_refuses_in_one_line(made, photo):
    for call, words in (
        (lambda: sparsify.show(made.path, "none.jpg"), "no image none.jpg"),
        (lambda: sparsify.show(made.path, photo, queries=["a"]), "query a: X,Y"),
        (lambda: sparsify.show(made.path, photo, layers=(9,)), "layer 9: numbers from 1 to 4"),
        (lambda: sparsify.show(made.model, photo, budget=0.5), "are of a file; this is a model"),
        (lambda: sparsify.show(made.model, photo, dense="digits"), "are of a file; this is a model"),
        (lambda: sparsify.show(torch.nn.Linear(2, 2), photo), "this model has no sparse attention"),
    ):
        with pytest.raises(SparsifyError, match=f"^[^\n]*{words}[^\n]*$"):
            call()


# ---- report ----


def test_report_writes_a_page_with_what_it_is_given(made, photo, tmp_path):
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(sparsify.profile(made.path, measure=False).as_dict()))
    page = sparsify.report(made.path, tmp_path / "page.html", images=photo, results={"profile": profile})
    assert page.path.stat().st_size >= page.size and page.parts == ("settings", "MACs", "1 image")
    assert "cat.png" in page.path.read_text()
    with pytest.raises(UsageError, match="either profile, figures of an earlier run, or measure"):
        sparsify.report(made.path, tmp_path / "page.html", results={"profile": profile}, measure=True)
    with pytest.raises(UsageError, match="results accuracy: expected are profile, eval and sweep"):
        sparsify.report(made.path, tmp_path / "page.html", results={"accuracy": profile})
    with pytest.raises(BadFile, match="holds no results of eval"):
        sparsify.report(made.path, tmp_path / "other.html", results={"eval": profile})
    assert not (tmp_path / "other.html").exists()


# ---- push ----


def test_push_shows_and_writes_what_it_would_send(made, tmp_path):
    shown = sparsify.push(made.path, "me/digits-sparse", dry_run=True, revision="try")
    assert (shown.url, shown.commit, shown.name) == ("", "", "hf-hub:me/digits-sparse@try")
    assert shown.package.card.startswith("---\n") and json.loads(shown.package.config)["num_classes"] == 10
    written = sparsify.push(made.path, "me/digits-sparse", output=tmp_path / "repo")
    assert sorted(p.name for p in (tmp_path / "repo").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    x = torch.zeros(1, 3, 28, 28)
    with torch.inference_mode():
        loaded = sparsify.load(written.name, backend="reference")(x)
        assert torch.equal(loaded, sparsify.load(made.path, backend="reference")(x))
    with pytest.raises(BadFile, match="overwrite with force"):
        sparsify.push(made.path, "me/digits-sparse", output=tmp_path / "repo")
    with pytest.raises(UsageError, match="dry_run writes nothing, output is a folder"):
        sparsify.push(made.path, "me/digits-sparse", output=tmp_path, dry_run=True)


def test_a_card_says_that_the_model_was_a_module(tmp_path):
    module = pretrained.load(names.resolve("digits"))
    path = sparsify.convert(module, calib_images=2, spread="none", output=tmp_path / "m.safetensors").path
    card = sparsify.push(path, "me/mine", dry_run=True).package.card
    assert "as its owner had it in Python" in card and "license: unknown" in card
    assert read_header(path).provenance["module"] is True


# ---- evaluate ----


def test_evaluate_takes_some_images_or_no_labels(made, tmp_path):
    some = sparsify.evaluate(made.path, "digits", limit=20, seed=1)
    assert some.images == 20 and some.top1 is not None
    assert sparsify.evaluate(made.path, "digits", limit=20, no_labels=True).top1 is None
    with pytest.raises(BadData):
        sparsify.evaluate(made.path, tmp_path)
