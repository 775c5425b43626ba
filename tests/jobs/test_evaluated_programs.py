"""`sparsify eval PROGRAM`: an exported program in its runtime, beside the file that it was made from."""

import json

import pytest
import torch

import sparsify
from helpers.error_lines import the_error
from sparsify.errors import BadFile
from sparsify.jobs import judge
from sparsify.jobs.export import answers
from sparsify.recipe import load_recipe

DIGITS = ("--data", "digits")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file, and its programs beside it."""
    path = tmp_path_factory.mktemp("programs") / "m.safetensors"
    recipe = load_recipe("calibrate").override(calib_images=4, spread="none", tokens={"keep": 0.8})
    sparsify.convert("digits", recipe=recipe, output=path)
    sparsify.export(path, "onnx", batch_size=7, attention="sparse", measure=False)
    sparsify.export(path, "openvino", batch_size=None, attention="dense", measure=False)
    return path


@pytest.mark.parametrize("suffix, attention", [(".onnx", "sparse"), (".xml", "dense")])
def test_a_program_answers_as_its_file(made, run, suffix, attention):
    code, out, err = run("eval", made.with_suffix(suffix), *DIGITS, "--results-file", "r.json")
    assert (
        code == 0 and f"{attention} attention; compared with m.safetensors" in out and "file" in out.split("top-1")[0]
    )
    found = json.loads(open("r.json").read())
    assert (
        found["images"] == 597
        and found["agreement"] > 99
        and found["top1"] == pytest.approx(found["dense_top1"], abs=0.4)
    )
    assert found["conditions"]["program"] == made.with_suffix(suffix).name
    if attention == "sparse":
        assert found["top1"] == pytest.approx(sparsify.evaluate(made, "digits").top1, abs=0.4)


def test_without_its_file_it_has_figures_of_its_own(made, run, tmp_path):
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(made.with_suffix(".onnx").read_bytes())
    code, out, _ = run("eval", alone, *DIGITS)
    assert code == 0 and "compared with nothing" in out and "agreement" not in out
    assert judge.evaluate_program(alone, "digits", file=made).evaluation.agreement > 99
    other = sparsify.convert("digits", keep=0.5, recipe=load_recipe("calibrate").override(calib_images=2, spread="none"),
                             output=tmp_path / "other.safetensors").path  # fmt: skip
    code, _, err = run("eval", alone, *DIGITS, "--of", other)
    assert code == 1 and "is not the file that" in the_error(err)
    (tmp_path / "alone.safetensors").write_bytes(other.read_bytes())  # of its name, but another
    assert judge.evaluate_program(alone, "digits").file is None


def test_batches_are_filled_up():
    runs = answers.of_any_number(lambda x: x.flatten(1) * (1 if len(x) == 4 else torch.nan), 4)
    x = torch.rand(6, 3, 1, 1)
    assert torch.equal(runs(x), x.flatten(1))


def test_what_is_no_program_is_refused(made, run, tmp_path):
    for name in ("x.onnx", "x.xml", "x.pt2"):
        (tmp_path / name).write_text("no program")
        with pytest.raises(BadFile, match="is not a program written by"):
            judge.evaluate_program(tmp_path / name, "digits")
    code, _, err = run("eval", made.with_suffix(".onnx"), *DIGITS, "--dtype", "bfloat16")
    assert code == 2 and "takes float32 images" in the_error(err)
