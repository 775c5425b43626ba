"""`sparsify export --int8`: what is rounded, how it is judged, what is refused."""

import json
import subprocess
import sys
from collections import Counter

import onnx
import pytest
import torch
from torch import nn

import sparsify
from helpers.error_lines import the_error
from sparsify.errors import SparsifyError, UsageError
from sparsify.jobs import judge
from sparsify.jobs.export import int8, onnx_file, openvino_file
from sparsify.jobs.export import program as exporting
from sparsify.recipe import load_recipe


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Digits with half of the keys and fewer tokens."""
    path = tmp_path_factory.mktemp("int8") / "m.safetensors"
    recipe = load_recipe("calibrate").override(keep=0.5, calib_images=4, spread="none", tokens={"keep": 0.8})
    sparsify.convert("digits", recipe=recipe, output=path)
    return path


@pytest.fixture(scope="module")
def openvino(file):
    """An OpenVINO program of three images a call."""
    pytest.importorskip("nncf")
    return exporting.export(file, "openvino", batch_size=3, attention="sparse", int8=True)


def test_an_openvino_program_answers_as_the_model_and_holds_a_quarter(openvino, file, run):
    rounded = openvino.rounded
    assert rounded.pictures == 64 and rounded.agreement >= 95 and rounded.kl < 0.01 and rounded.cosine is None
    assert openvino.timed.int8 and openvino.attention == "sparse"
    assert openvino.path.with_suffix(".bin").stat().st_size < 0.4 * file.stat().st_size
    about = json.loads(openvino_file.metadata(str(openvino.path))["sparsify.export"])
    assert about["precision"] == "int8" and about["batch"] == 3
    code, out, _ = run("eval", openvino.path, "--data", "digits")
    assert code == 0 and "sparse attention, int8 linear layers; compared with m.safetensors" in " ".join(out.split())
    assert judge.evaluate_program(openvino.path, "digits").evaluation.agreement > 98


def test_nothing_else_is_printed(file, tmp_path):
    """By NNCF, which draws a bar, nor by what it imports."""
    pytest.importorskip("nncf")
    words = ("export", file, "--format", "openvino", "--int8", "--attention", "dense", "--no-measure", "-q")
    command = [sys.executable, "-c", "from sparsify.cli.app import main; main()", *map(str, words), "-o", "m.xml"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert [line.split()[0] for line in ended.stdout.splitlines()] == ["wrote", "int8"]


def test_an_onnx_program_of_any_batch(file, run):
    code, out, err = run("export", file, "--int8", "--dynamic-batch", "--attention", "dense", "--no-measure", "--force")
    assert code == 0, err
    assert "int8 linear layers: answers as the float32 model on" in out and "measured" not in out
    path = file.with_suffix(".onnx")
    assert path.stat().st_size < 0.6 * file.stat().st_size and not path.with_name("m.onnx.onnx").exists()
    kept = onnx_file.metadata(str(path))
    about = json.loads(kept["sparsify.export"])
    assert (about["precision"], about["batch"], about["attention"]) == ("int8", "any", "dense")
    assert "sparsify.preprocessing" in kept
    runs = onnx_file.runner(str(path))
    for count in (1, 5):
        assert runs(torch.zeros(count, 3, 28, 28)).shape == (count, 10)
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    layers = sum(isinstance(module, nn.Linear) for module in sparsify.load(file).modules())
    products = 2 * len(sparsify.load(file).blocks)  # of activations: they stay float32, as importance does
    assert operators["MatMulInteger"] == layers and operators["MatMul"] >= products


def judged(change, classes=3):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).requires_grad_(False)
    model.num_classes = classes
    images = torch.rand(16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return int8.judge(model, lambda x: change(model(x)), images, 3)


def test_the_answers_are_judged_and_wrong_ones_refused():
    assert judged(lambda y: y).agreement == 100 and "100.0 % of 16 pictures (KL 0.0000)" in judged(lambda y: y).words()
    features = judged(lambda y: y + 1e-3, classes=0)
    assert features.agreement is None and features.cosine == pytest.approx(1, abs=1e-3) and "cosine" in features.words()
    for wrong in (lambda y: -y, lambda y: y * torch.nan):
        with pytest.raises(SparsifyError, match="nothing written"):
            judged(wrong)
    with pytest.raises(SparsifyError, match="nothing written"):
        judged(lambda y: -y, classes=0)


def test_what_cannot_be_in_int8_is_one_line(file, run, monkeypatch):
    before = sorted(p.name for p in file.parent.iterdir())
    code, _, err = run("export", file, "--int8", "--format", "pt2")
    assert code == 2 and the_error(err) == "error: --int8: only onnx and openvino programs, not pt2"
    with pytest.raises(UsageError, match="int8"):
        sparsify.export(file, "pt2", int8=True)
    for package, format, extra in (("nncf", "openvino", "int8"), ("onnxruntime", "onnx", "export")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            code, _, err = run("export", file, "--int8", "--format", format, "--force")
            said = f"error: --int8 needs {package}: pip install 'sparsify-vit[{extra}]'"
            assert code == 1 and the_error(err) == said
    assert sorted(p.name for p in file.parent.iterdir()) == before
