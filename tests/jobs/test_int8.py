"""`sparsify export --int8`: what is quantised, how it is judged, what is refused."""

import json
import sys

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

import sparsify
from helpers.error_lines import the_error
from sparsify.errors import BadData, SparsifyError, UsageError
from sparsify.jobs import judge
from sparsify.jobs.export import int8, onnx_file, openvino_file
from sparsify.jobs.export import program as exporting
from sparsify.recipe import load_recipe

pytest.importorskip("nncf")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Digits with half of the keys and fewer tokens."""
    path = tmp_path_factory.mktemp("int8") / "m.safetensors"
    recipe = load_recipe("calibrate").override(keep=0.5, calib_images=4, spread="none", tokens={"keep": 0.8})
    sparsify.convert("digits", recipe=recipe, output=path)
    return path


@pytest.fixture
def few(monkeypatch):
    """Few images, to be quick."""
    monkeypatch.setattr(int8, "IMAGES", 24)


@pytest.fixture(scope="module")
def openvino(file):
    """An OpenVINO program of three images a call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "IMAGES", 24)
        return exporting.export(file, "openvino", batch_size=3, attention="sparse", int8=True)


def test_an_openvino_program_answers_as_the_model_and_holds_a_quarter(openvino, file, run):
    rounded = openvino.rounded
    assert (rounded.calibrated, rounded.judged, rounded.source) == (24, 24, "digits")
    assert rounded.agreement >= 90 and rounded.kl < 0.05 and rounded.cosine is None
    assert openvino.timed.int8 and openvino.attention == "sparse"
    assert openvino.path.with_suffix(".bin").stat().st_size < 0.4 * file.stat().st_size
    about = json.loads(openvino_file.metadata(str(openvino.path))["sparsify.export"])
    assert about["precision"] == "int8" and about["batch"] == 3
    code, out, _ = run("eval", openvino.path, "--data", "digits")
    assert code == 0 and "sparse attention, int8 linear layers; compared with m.safetensors" in " ".join(out.split())
    assert judge.evaluate_program(openvino.path, "digits").evaluation.agreement > 95


def test_only_linear_layers_are_int8(openvino):
    weighted = others = 0
    for op in openvino_file.read(str(openvino.path)).get_ops():
        if op.get_type_name() not in openvino_file.WEIGHTED:
            continue
        sources = [op.input_value(i).get_node().get_type_name() for i in (0, 1)]
        if sources[0] == "FakeQuantize":
            weighted += 1
        else:
            assert "FakeQuantize" not in sources
            others += 1
    model = sparsify.load(openvino.path.with_suffix(".safetensors"))
    blocks = len(model.blocks)
    assert weighted >= 4 * blocks and others >= 2 * blocks


def test_an_onnx_program_of_any_batch(file, few, run):
    path = file.with_suffix(".onnx")
    code, out, err = run("export", file, "--int8", "--dynamic-batch", "--no-measure", "--force")
    assert code == 0, err
    assert "int8 linear layers, calibrated on 24 images of digits: answers as the float32 model on" in out
    about = json.loads(onnx_file.metadata(str(path))["sparsify.export"])
    assert about["precision"] == "int8" and about["batch"] == "any"
    assert "sparsify.preprocessing" in onnx_file.metadata(str(path))
    run_program = onnx_file.runner(str(path))
    for count in (1, 5):
        assert run_program(torch.zeros(count, 3, 28, 28)).shape == (count, 10)


def test_it_is_calibrated_on_and_judged_by_images_that_are_given(file, few, tmp_path):
    draw = numpy.random.default_rng(0)
    for n in range(5):
        Image.fromarray(draw.integers(0, 255, (32, 32), dtype=numpy.uint8)).save(tmp_path / f"{n}.png")
    found = int8.pictures(sparsify.load(file), "digits", str(tmp_path))
    assert (len(found.calibrate), len(found.judge), found.source) == (2, 3, str(tmp_path))
    assert not any(torch.equal(a, b) for a in found.calibrate for b in found.judge)
    for n in range(1, 5):
        (tmp_path / f"{n}.png").unlink()
    with pytest.raises(BadData, match="holds 1 image; 2 or more are expected"):
        int8.pictures(sparsify.load(file), "digits", str(tmp_path))


def judged(change, classes=3):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).requires_grad_(False)
    model.num_classes = classes
    images = torch.rand(20, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return int8.judge(model, lambda x: change(model(x)), int8.Pictures(images[:4], images[4:], "here"), 3)


def test_the_answers_are_judged_and_wrong_ones_refused():
    assert judged(lambda y: y).agreement == 100 and "100.0 % (KL 0.0000) of 16 others" in judged(lambda y: y).words()
    features = judged(lambda y: y + 1e-3, classes=0)
    assert features.agreement is None and features.cosine == pytest.approx(1, abs=1e-3) and "cosine" in features.words()
    for wrong in (lambda y: -y, lambda y: y * torch.nan):
        with pytest.raises(SparsifyError, match="nothing written"):
            judged(wrong)
    with pytest.raises(SparsifyError, match="nothing written"):
        judged(lambda y: -y, classes=0)


def test_what_cannot_be_quantised_is_one_line(file, few, run, monkeypatch):
    before = sorted(p.name for p in file.parent.iterdir())
    for arguments, words in [
        (["--int8", "--format", "pt2"], "--int8: only onnx and openvino programs, not pt2"),
        (["--data", "digits"], "--data is to calibrate --int8 on: give both"),
    ]:
        code, _, err = run("export", file, *arguments)
        assert code == 2 and the_error(err) == f"error: {words}"
    with pytest.raises(UsageError, match="int8"):
        sparsify.export(file, "pt2", int8=True)
    monkeypatch.setitem(sys.modules, "nncf", None)
    code, _, err = run("export", file, "--int8", "-o", "other.onnx")
    assert code == 1 and the_error(err) == "error: --int8 needs nncf: pip install 'sparsify-vit[int8]'"
    assert sorted(p.name for p in file.parent.iterdir()) == before
