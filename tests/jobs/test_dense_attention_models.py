"""What 'dense' means for a fine-tuned file: the original or nothing, never the changed weights without sparsity."""

import csv
import json

import pytest
import torch
from safetensors.torch import save_file

import sparsify
from helpers.error_lines import the_error
from helpers.families import images
from sparsify.errors import BadFile, UsageError
from sparsify.images import datasets
from sparsify.measure import latency, profile
from sparsify.measure.accuracy import Logits
from sparsify.models import checkpoint, original, pretrained
from sparsify.models.digits import network
from sparsify.models.names import resolve
from sparsify.nn import graft

DENSE_FIGURES = (
    "dense_top1", "dense_top5", "agreement", "images_lost", "images_gained", "kl", "cosine_pooled", "cosine_patch",
    "rel_error_pooled", "rel_error_patch", "dense_knn_top1", "throughput_dense",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A calibrated file that knows its original, `same`; one with a weight nudged, `tuned`; dense checkpoints."""
    folder = tmp_path_factory.mktemp("dense")
    made = sparsify.convert("digits", output=folder / "same.safetensors", calib_images=8, spread="none")
    dense = network.build()
    known = made.header.provenance | {"dense_sha256": checkpoint.digest_of(dense)}
    checkpoint.save(made.model, made.path, made.header._replace(provenance=known))
    with torch.no_grad():
        made.model.head.bias[0] += 4
    changed = made.header._replace(provenance=known | {"backbone_changed": True})
    checkpoint.save(made.model, folder / "tuned.safetensors", changed)
    old = {name: value for name, value in changed.provenance.items() if name != "dense_sha256"}
    checkpoint.save(made.model, folder / "old.safetensors", changed._replace(provenance=old))
    save_file(dense.state_dict(), folder / "dense.safetensors")
    torch.save(dense.state_dict(), folder / "dense.pth")
    with torch.no_grad():
        dense.head.bias[0] += 1
    save_file(dense.state_dict(), folder / "other.safetensors")
    return folder


@pytest.fixture
def quick(monkeypatch):
    whole = latency.interleaved
    monkeypatch.setattr(latency, "interleaved", lambda runs, **how: whole(runs, **how | {"rounds": 2}))


def test_digest_changes_with_any_tensor_and_with_nothing_else():
    model = network.build()
    digest = checkpoint.digest_of(model)
    assert digest == checkpoint.digest_of(network.build()) == checkpoint.digest_of(pretrained.load(resolve("digits")))
    for name, tensor in model.state_dict().items():
        before = tensor.flatten()[-1].clone()
        tensor.view(-1)[-1] += 1
        assert checkpoint.digest_of(model) != digest, name
        tensor.view(-1)[-1] = before
    assert checkpoint.digest_of(model) == digest
    assert checkpoint.digest_of(model.bfloat16()) != digest


def test_changed_file_alone_has_no_dense_figures_and_a_line_says_why(run, files):
    code, out, err = run("eval", files / "tuned.safetensors", "--data", "digits", "--results-file", "r.json")
    assert code == 0 and "–" in out and "no dense figures" in err and "--dense digits" in err
    row = json.loads(open("r.json").read())
    assert all(row[name] is None for name in DENSE_FIGURES) and row["images"] == 597
    assert row["top1"] > 30 and row["throughput_sparse"] > 0
    code, _, _ = run("eval", files / "tuned.safetensors", "--data", "digits", "--results-file", "r.csv", "-q")
    (cells,) = csv.DictReader(open("r.csv"))
    assert code == 0 and all(cells[name] == "" for name in DENSE_FIGURES) and float(cells["top1"]) == row["top1"]


def test_changed_file_is_compared_with_the_original_that_is_given(run, files):
    model, dense = checkpoint.load(files / "tuned.safetensors"), network.build()
    expected, wrong, hits = Logits(), 0, 0
    loader = datasets.labelled("digits", 10, datasets.transform(datasets.data_config(model)), 32)
    with torch.inference_mode():
        for x, y in loader:
            d, s = dense(x), model(x)
            expected.add(d, s, y)
            wrong += int(((d.argmax(1) == y) & (s.argmax(1) != y)).sum())
            hits += int((d.argmax(1) == y).sum())
    for given in ("digits", files / "dense.safetensors", files / "dense.pth"):
        code, out, err = run("eval", files / "tuned.safetensors", "--data", "digits", "--dense", given,
                             "--results-file", "r.json")  # fmt: skip
        assert code == 0 and "no dense figures" not in err, err
        row = json.loads(open("r.json").read())
        assert row["dense_top1"] == pytest.approx(100 * hits / 597) and row["images_lost"] == wrong > 0
        assert row["kl"] == pytest.approx(expected.kl / 597, rel=1e-3) and row["throughput_dense"] > 0


def test_unchanged_file_may_be_given_its_original(run, files):
    rows = []
    for dense in ([], ["--dense", "digits"]):
        assert run("eval", files / "same.safetensors", "--data", "digits", "--results-file", "r.json", *dense)[0] == 0
        rows.append(json.loads(open("r.json").read()))
    for name in ("dense_top1", "top1", "agreement", "images_lost", "images_gained"):
        assert rows[0][name] == rows[1][name]


def test_profile_of_a_changed_file(run, files, quick):
    code, out, err = run("profile", files / "tuned.safetensors", "--json", "p.json", "--markdown", "p.md", "--tree",
                         "--count-as", "paper")  # fmt: skip
    assert code == 0 and "no dense figures" in err and "--dense digits" in err and "–" in out
    assert "faster than dense" not in out and "than dense" not in open("p.md").read()
    assert "No dense figures" in open("p.md").read()
    tree = json.loads(open("p.json").read())
    names = [name for name in tree if name.endswith("_dense") or "_dense_" in name]
    assert len(names) == 8 and all(tree[name] is None for name in [*names, "speedup_sparse"])
    assert tree["paper"]["mhsa_macs_dense"] is None and tree["paper"]["mhsa_macs_sparse"] > 0
    assert {row["macs_dense"] for row in tree["modules"]} == {None} and tree["macs_sparse"] > 0
    assert {choice["taken"] for choice in tree["choices"]} <= {"cpu", "reference"}

    code, out, _ = run("profile", files / "tuned.safetensors", "--json", "d.json", "--dense", "digits")
    beside = json.loads(open("d.json").read())
    same = sparsify.profile(files / "same.safetensors", measure=False)
    assert code == 0 and beside["macs_dense"] == same.macs_dense and beside["macs_sparse"] == tree["macs_sparse"]
    assert beside["param_count_dense"] == same.param_count_dense and beside["latency_ms_dense"] > 0
    assert {choice["taken"] for choice in beside["choices"]} <= {"cpu", "reference"}


def test_library_has_the_same_rule(files):
    alone = sparsify.evaluate(files / "tuned.safetensors", "digits", batch_size=64)
    beside = sparsify.evaluate(files / "tuned.safetensors", "digits", batch_size=64, dense="digits")
    module = sparsify.evaluate(files / "tuned.safetensors", "digits", batch_size=64, dense=network.build())
    assert alone.dense_top1 is None and alone.top1 == beside.top1
    assert beside.dense_top1 == module.dense_top1 > 95 and beside.images_lost == module.images_lost
    model = checkpoint.load(files / "tuned.safetensors")
    twin = sparsify.evaluate(model, "digits", batch_size=64)  # of a module nobody knows whether it was changed
    assert twin.dense_top1 is not None
    assert sparsify.evaluate(model, "digits", batch_size=64, backbone_changed=True).dense_top1 is None
    assert sparsify.profile(files / "tuned.safetensors", measure=False).macs_dense is None
    figures = sparsify.profile(files / "tuned.safetensors", measure=False, dense=files / "dense.pth")
    assert figures.macs_dense == profile.profile(model, measure=False).macs_dense
    with pytest.raises(UsageError, match="dense model itself"):
        sparsify.profile(model, dense="digits")
    with pytest.raises(UsageError, match="has sparse attention"):
        sparsify.evaluate(model, "digits", dense=model)
    with pytest.raises(UsageError, match="7 classes"):
        other = network.build()
        other.reset_classifier(7)
        sparsify.profile(model, dense=other, measure=False)


BAD = {  # what is given as --dense, exit code, words of the one line
    "other weights": ("other.safetensors", 1, "its weights differ"),
    "other architecture": ("deit_tiny", 1, "digits"),
    "converted": ("same.safetensors", 1, "'sparsify convert' wrote"),
    "missing": ("none.safetensors", 1, "does not exist"),
    "no checkpoint": ("text.pth", 1, "text.pth"),
    "unknown name": ("digitss", 2, "unknown model"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("command", [["eval", "--data", "digits"], ["profile"]])
def test_wrong_dense_is_one_line_and_an_exit_code(kind, command, run, files):
    given, expected, words = BAD[kind]
    (files / "text.pth").write_text("hello")
    path = files / given
    code, out, err = run(*command, files / "tuned.safetensors", "--dense", path if path.suffix else given)
    assert code == expected and words in the_error(err) and "throughput" not in out
    if kind != "unknown name" and "weights differ" in err:
        assert "--dense digits" in err


def test_file_that_does_not_know_its_original_says_so(run, files):
    header = checkpoint.read_header(files / "old.safetensors")
    assert header.dense_sha256 == "" and header.backbone_changed
    code, _, err = run("eval", files / "old.safetensors", "--data", "digits", "--dense", "digits")
    assert code == 0 and "does not record" in " ".join(err.split())
    with pytest.raises(BadFile, match="architecture|not the model"):
        original.load_original(header, "deit_tiny")


def test_another_image_size_is_compared_before_it_is_resampled(run, files):
    header = checkpoint.read_header(files / "tuned.safetensors")
    dense = original.load_original(header, "digits", img_size=42)
    with torch.inference_mode():
        assert dense(torch.randn(1, 3, 42, 42)).shape == (1, 10)
    code, _, err = run("profile", files / "tuned.safetensors", "--dense", "digits", "--img-size", 42, "--no-measure")
    assert code == 0, err
    with pytest.raises(UsageError) as error:
        original.load_original(header, "digits", img_size=1)
    assert "--img-size 1: " in error.value.for_command_line()
    with pytest.raises(UsageError, match="patches"):
        sparsify.profile(files / "tuned.safetensors", dense=dense, measure=False)


def test_of_a_checkpoint_of_ones_own_the_checkpoint_is_asked_for(files):
    header = checkpoint.read_header(files / "tuned.safetensors")
    own = header._replace(provenance=header.provenance | {"weights": "mine.pth", "backbone_changed": None})
    line = original.missing(own)
    assert "mine.pth" in line and "does not say" in line and "\n" not in line


def test_a_dense_model_is_left_as_it_is_by_profile(files):
    dense = network.build().train()
    before = {name: (t.data_ptr(), t.dtype) for name, t in dense.state_dict().items()}
    sparsify.profile(files / "tuned.safetensors", dense=dense, dtype="bfloat16", repeats=1)
    assert {name: (t.data_ptr(), t.dtype) for name, t in dense.state_dict().items()} == before and dense.training
    x = images(graft.dense_twin(checkpoint.load(files / "same.safetensors")))
    assert x.shape[-1] == 28
