"""Programs written by `export`: the same answers elsewhere, the file's metadata, and nothing half-written."""

import json
import subprocess
import sys
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from torch import nn

import sparsify
from helpers.error_lines import the_error
from helpers.families import FAMILIES, build, draw_importance, images
from sparsify.config import SparsityConfig, Tokens
from sparsify.errors import BadFile, SparsifyError, UsageError
from sparsify.jobs.export import answers, onnx_file, openvino_file
from sparsify.jobs.export import program as exporting
from sparsify.models import checkpoint
from sparsify.nn import graft, schedules
from sparsify.nn.merging import matching
from sparsify.nn.tokens import ranking
from sparsify.ops import selection
from sparsify.recipe import load_recipe

NARROW = {"siglip": dict(embed_dim=96, num_heads=3), "dinov2-registers": dict(embed_dim=96, num_heads=3)}
MERGED = Tokens(keep=0.7, stages=(1,))


def converted(folder, family, tokens=None, depth=1, **settings):
    """A file of a small sparse model with random weights, and the model."""
    name, arguments = FAMILIES[family]
    arguments = {**arguments, **NARROW.get(family, {})}
    model = build(family, depth=depth, **NARROW.get(family, {}))
    config = SparsityConfig(**{"keep": 0.3, "rank": 8, "cells": (2, 2), "tokens": tokens, **settings})
    draw_importance(graft.graft(model, config))
    pretrained = {"mean": [0.4, 0.5, 0.6], "license": "apache-2.0", "label_names": [f"class {i}" for i in range(10)]}
    size = list(model.patch_embed.img_size)
    args = {**arguments, "num_classes": 10, "img_size": size, "depth": depth}
    architecture = {"architecture": name, "model_args": args, "pretrained_cfg": pretrained}
    path = folder / "model.safetensors"
    checkpoint.save(model, path, checkpoint.Header(architecture, config, {"seed": 0}, {"macs_sparse": 1}))
    return path, model.requires_grad_(False)


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    found = torch.from_numpy(session.run(["logits"], {entry.name: x.numpy()})[0])
    return found, entry.shape, session.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize(
    "family,tokens,batch",
    [
        ("deit", None, None),
        ("deit", MERGED, 2),
        ("dinov2-registers", None, 2),
        ("dinov2-registers", MERGED.model_copy(update={"way": "evit-fused"}), None),
        ("siglip", None, 1),
        ("siglip", MERGED, 3),
    ],
)
def test_onnx_answers_as_the_model_does(tmp_path, family, tokens, batch):
    path, model = converted(tmp_path, family, tokens, 2 if family == "deit" and tokens else 1)
    made = exporting.export(path, "onnx", batch_size=batch)
    assert made.checked.most < 1e-4 and made.checked.apart == 0
    side = model.patch_embed.img_size[0]
    for count in (1, 3) if batch is None else (batch,):
        x = images(model, count)
        found, shape, kept = run_onnx(made.path, x)
        assert shape == ["batch" if batch is None else batch, 3, side, side]
        torch.testing.assert_close(found, model(x), atol=1e-4, rtol=1e-4)
    own = checkpoint.metadata(path)
    assert own.pop("format") == "pt" and own.items() <= kept.items() and kept["sparsify.licence"] == "apache-2.0"
    fed = json.loads(kept["sparsify.preprocessing"])
    assert fed["input_size"] == [3, side, side] and fed["mean"] == [0.4, 0.5, 0.6] and fed["interpolation"] == "bicubic"
    assert json.loads(kept["sparsify.labels"])[9] == "class 9"
    about = json.loads(kept["sparsify.export"])
    assert about["attention"] == made.attention == "sparse"  # the file does not say that its backbone is the original's
    assert (about["format"], about["input"], about["output"]) == ("onnx", "images", "logits")
    assert about["batch"] == (batch or "any") and str(tmp_path) not in json.dumps(kept)


@pytest.mark.parametrize(
    "family,tokens,batch",
    [("deit", MERGED, None), ("dinov2-registers", None, 2), ("siglip", MERGED.model_copy(update={"way": "evit"}), 1)],
)
def test_openvino_answers_as_the_model_does(tmp_path, family, tokens, batch):
    path, model = converted(tmp_path, family, tokens)
    made = exporting.export(path, "openvino", batch_size=batch)
    assert made.checked.most < 1e-4 and made.checked.apart == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.safetensors", "model.xml"]
    assert made.bytes == sum((tmp_path / f"model.{end}").stat().st_size for end in ("xml", "bin"))
    with openvino_file._unreported() as openvino:
        (entry,) = openvino.Core().read_model(made.path).inputs  # as anybody reads it
    side = model.patch_embed.img_size[0]
    assert entry.names == {"images"} and entry.partial_shape == openvino.PartialShape([batch or -1, 3, side, side])
    run = openvino_file.runner(str(made.path))
    for count in (1, 3) if batch is None else (batch,):
        x = images(model, count)
        torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=1e-4)
    kept, own = openvino_file.metadata(str(made.path)), checkpoint.metadata(path)
    own.pop("format")
    assert own.items() <= kept.items() and json.loads(kept["sparsify.export"])["format"] == "openvino"


def test_openvino_tells_nobody_of_an_export(tmp_path):
    path, _ = converted(tmp_path, "deit")
    words = (
        "import sys; from sparsify.cli.app import main\ntry: main(['export', *sys.argv[1:]])\nexcept SystemExit: pass\n"
    )
    words += "assert 'openvino' in sys.modules; print('openvino_telemetry' in sys.modules)"
    command = [sys.executable, "-c", words, path, "--format", "openvino", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and (tmp_path / "model.xml").exists()


@pytest.fixture
def unchanged(tmp_path):
    """A file whose backbone is the dense original's, with keep 0.3 and fewer tokens; and its model."""
    path, model = converted(tmp_path, "deit", MERGED, depth=2)
    header = checkpoint.read_header(path)
    checkpoint.save(model, path, header._replace(provenance={"backbone_changed": False}))
    return path, model


def test_dense_attention_over_the_tokens_present_where_the_backbone_is_the_originals(unchanged, tmp_path):
    path, model = unchanged
    made = exporting.export(path, "pt2", attention="dense", measure=False)
    assert made.attention == "dense" and made.timed is None
    program, x = torch.export.load(made.path).module(), images(model, 1)
    dense = schedules.applied(model, checkpoint.read_header(path).config.model_copy(update={"keep": "dense"}))
    torch.testing.assert_close(program(x), dense(x), atol=1e-5, rtol=1e-5)
    assert (program(x) - model(x)).abs().max() > 1e-3
    kept = {"sparsify.export": ""}
    torch.export.load(made.path, extra_files=kept)
    assert json.loads(kept["sparsify.export"])["attention"] == "dense"
    assert exporting.export(path, "pt2", attention="sparse", measure=False, force=True).attention == "sparse"
    assert exporting.export(path, "pt2", measure=False, force=True).attention == "dense"


@pytest.mark.parametrize("faster", ["dense", "sparse"])
def test_auto_writes_the_attention_that_is_faster_here(unchanged, run, monkeypatch, faster):
    path, _ = unchanged

    def times(runs, rounds):
        assert [*runs] == ["original", "dense", "sparse"]
        return {name: SimpleNamespace(median={"original": 6.0, faster: 4.0}.get(name, 8.0)) for name in runs}

    monkeypatch.setattr(exporting, "interleaved", times)
    code, out, err = run("export", path, "--format", "pt2")
    assert code == 0 and f"{faster} attention" in err.splitlines()
    assert "1.50x as fast as the dense model in the same runtime (4 ms against 6 ms)" in out
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.pt2", "model.safetensors"]
    kept = {"sparsify.export": ""}
    torch.export.load(path.with_suffix(".pt2"), extra_files=kept)
    assert json.loads(kept["sparsify.export"])["attention"] == faster


def test_a_model_without_sparse_blocks_has_dense_attention(tmp_path):
    path = tmp_path / "m.safetensors"
    recipe = load_recipe("calibrate").override(keep="dense", calib_images=2, tokens={"keep": 0.7})
    sparsify.convert("digits", recipe=recipe, output=path)
    assert exporting.export(path, "pt2", measure=False).attention == "dense"


def test_a_program_that_is_slower_says_so_and_a_changed_backbone_stays_sparse(tmp_path):
    assert "slower (0.50x) than the dense model" in exporting.Timed(4.0, 8.0, 2).words()
    path, _ = converted(tmp_path, "deit")
    with pytest.raises(UsageError, match="fine-tuned with sparse attention"):
        exporting.export(path, "pt2", attention="dense")
    assert not path.with_suffix(".pt2").exists()


ELSEWHERE = """
import sys
sys.modules.update(sparsify=None, timm=None)  # importing them fails
import torch
extra = {"sparsify.preprocessing": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
torch.save([program(x) for x in torch.load(sys.argv[2])], sys.argv[3])
print(extra["sparsify.preprocessing"], *extra)
"""


def test_pt2_runs_where_this_package_is_not(run, tmp_path):
    path, model = converted(tmp_path, "deit", MERGED, predictor="token-lowrank")
    words = ["--format", "pt2", "--dynamic-batch", "--img-size", 64, "-o", tmp_path / "other.pt2"]
    code, out, err = run("export", path, *words)
    assert code == 0 and "checked against the model on 8 pictures" in err and "near ties" not in err
    graft.resize(model, 64)
    batches = [images(model, 1), images(model, 3)]
    torch.save(batches, tmp_path / "in")
    command = [sys.executable, "-c", ELSEWHERE, tmp_path / "other.pt2", tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for x, found in zip(batches, torch.load(tmp_path / "out"), strict=True):
        torch.testing.assert_close(found, model(x), atol=1e-4, rtol=1e-4)
    fed, end = json.JSONDecoder().raw_decode(done.stdout)
    assert fed["input_size"] == [3, 64, 64] and "sparsify.provenance" in done.stdout[end:].split()


class Choices(nn.Module):
    """Everything that is chosen by order: keys, tokens that stay, tokens that merge."""

    def forward(self, x):
        keep, group = ranking(x[:, 0], 5, True)
        return selection.top_b(x, 4), keep, group, *matching(x.mT, x[:, 0].abs() + 1, 7)


def test_ties_are_decided_alike(tmp_path):
    x = torch.randint(0, 3, (4, 6, 12), generator=torch.Generator().manual_seed(0)).float()  # nearly all are ties
    program = torch.export.export(Choices(), (x,))
    names = ["kept", "keep", "group", "stay", "into"]
    table = {torch.ops.aten.sort.stable: onnx_file._stable_sort()}
    torch.onnx.export(program, dynamo=True, verbose=False, output_names=names, custom_translation_table=table).save(
        str(tmp_path / "choices.onnx"), external_data=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "choices.onnx")
    found = session.run(names, {session.get_inputs()[0].name: x.numpy()})
    for name, ours, theirs in zip(names, Choices()(x), found, strict=True):
        assert torch.equal(ours, torch.from_numpy(theirs)), name


def fake(differences):
    """Nothing is traced; the program's answers differ by these from the model's, picture by picture."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).requires_grad_(False)
    left = iter(differences)

    def program(x):
        return model(x) + torch.tensor([next(left) for _ in x])[:, None]

    return model, program


def test_a_near_tie_may_differ_but_a_wrong_program_is_refused():
    pictures = torch.rand(4, 3, 2, 2)
    checked = answers.compare(*fake([0, 1e-4, 0.1, 0]), pictures, None)
    assert checked.apart == 1 and checked.most == pytest.approx(0.1, 1e-3) and "on 1: near ties" in checked.words()
    assert checked.median == pytest.approx(5e-5, 0.1)
    checked = answers.compare(*fake([0.0] * 6), pictures, 3)  # the last batch is filled up
    assert checked == (0, 0, 0, 4, checked.largest)
    for wrong in ([0, 0.1, 0.1, 0], [float("nan")] * 4):
        with pytest.raises(SparsifyError, match="of 4 pictures.*nothing written"):
            answers.compare(*fake(wrong), pictures, None)


def test_a_wrong_program_leaves_the_old_file(run, tmp_path, monkeypatch):
    path, _ = converted(tmp_path, "deit")
    monkeypatch.setattr(exporting, "trace", lambda *_: None)
    writes = SimpleNamespace(
        SUFFIX=".onnx",
        COMPARES=False,
        beside=lambda path: (),
        check_packages=lambda: None,
        check_size=lambda size: None,
        write=lambda *_: None,
        runner=lambda path: lambda x: x[:, 0, 0],
    )
    monkeypatch.setitem(exporting.FORMATS, "onnx", writes)
    old = tmp_path / "model.onnx"
    old.write_text("old")
    code, _, err = run("export", path, "--force")
    assert code == 1 and "nothing written" in err and old.read_text() == "old"
    writes.write = lambda *_: (_ for _ in ()).throw(RuntimeError("no such operator"))
    code, _, err = run("export", path, "--force")
    assert code == 1 and "no such operator" in the_error(err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.safetensors"]


def test_bad_words_are_refused_before_anything_is_read(run, tmp_path, monkeypatch):
    (tmp_path / "there.onnx").touch()
    for arguments, code, words in [
        (["--format", "tflite"], 2, "expected one of onnx, openvino, pt2"),
        (["-o", "model.bin"], 2, "ends in .onnx"),
        (["--format", "openvino", "-o", "model.onnx"], 2, "ends in .xml"),
        (["--attention", "none"], 2, "expected one of auto, dense, sparse"),
        (["--budget", 0.5, "--adaptive", 0.5], 2, "either --budget"),
        (["-o", "there.onnx"], 1, "--force"),
        (["--dynamic-batch", "--batch-size", 2], 2, "leave --batch-size out"),
        ([], 1, "no file model.safetensors"),
    ]:
        found, _, err = run("export", *arguments)
        assert found == code and words in err, arguments
    with pytest.raises(BadFile, match="no file"):
        exporting.export(tmp_path / "absent.safetensors", "pt2")
    with pytest.raises(UsageError, match=r"\.pt2"):
        exporting.export(tmp_path / "absent.safetensors", "pt2", "x.onnx")
    with pytest.raises(SparsifyError, match=r"4\.4 GB.*pt2"):
        onnx_file.check_size(4_400_000_000)


def test_missing_packages_are_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = run("export", "--format", "onnx")
    assert code == 1 and "needs onnxscript: pip install 'sparsify-vit[export]'" in err
    monkeypatch.setitem(sys.modules, "openvino", None)
    code, _, err = run("export", "--format", "openvino")
    assert code == 1 and "needs openvino: pip install 'sparsify-vit[openvino]'" in err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert onnx_file.runner("any.onnx") is None
