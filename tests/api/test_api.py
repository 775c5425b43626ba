"""The functions of the library, as its docstring shows them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparsify
from helpers.image_folders import class_folders
from sparsify.errors import SparsifyError, UsageError
from sparsify.models import checkpoint
from sparsify.nn import attention, graft
from sparsify.nn.attention import Execution
from sparsify.ops.auto import Choice, Chooser


def test_convert_load_profile_evaluate(tmp_path):
    path = tmp_path / "digits.safetensors"
    made = sparsify.convert("digits", keep=0.2, output=path, calib_images=8, spread="none")
    assert made.path == path and made.header.config.keep == 0.2
    model = sparsify.load(path)
    figures = sparsify.profile(model, measure=False).as_dict()
    assert figures["macs_sparse"] < figures["macs_dense"]
    result = sparsify.evaluate(model, "digits", batch_size=64)
    assert result.images == 597 and result.agreement > 98
    with pytest.raises(Exception, match="keep"):
        sparsify.convert("digits", keep=2, output=path)


def executions(model):
    return {module.execution for module in attention.sparse_modules(model).values()}


def test_load_chooses_how_to_compute_and_evaluate_never_takes_the_dense_way(tmp_path, monkeypatch):
    path = tmp_path / "digits.safetensors"
    made = sparsify.convert("digits", output=path, calib_images=2, spread="none")
    assert executions(made.model) == {Execution()}
    model = sparsify.load(path)
    (execution,) = executions(model)
    assert (execution.backend, execution.precision, execution.dense_fallback) == ("auto", "input", True)
    assert isinstance(execution.choose, Chooser)
    (other,) = executions(sparsify.load(path, backend="reference", kernel_precision="bf16"))
    assert other == Execution("reference", "bf16")
    with pytest.raises(UsageError, match="magic"):
        sparsify.load(path, backend="magic")

    seen = []
    monkeypatch.setattr(Chooser, "choose", lambda self, shape, sparse: seen.append(shape) or Choice("sdpa", {}, 0, ""))
    x = torch.zeros(1, *model.default_cfg["input_size"])
    with torch.inference_mode():
        dense, chosen = graft.dense_twin(model)(x), model(x)
    assert len(seen) == 8 and torch.equal(chosen, dense)  # once for the check of the whole model
    assert sparsify.evaluate(model, "digits", batch_size=64).kl > 0 and len(seen) == 8
    assert executions(model) == {execution}

    changed = made.header._replace(provenance=made.header.provenance | {"backbone_changed": True})
    checkpoint.save(made.model, path, changed)
    assert executions(sparsify.load(path)) == {Execution()}
    assert {choice["taken"] for choice in sparsify.profile(path, repeats=1).choices} <= {"cpu", "reference"}


def test_importing_the_package_does_not_import_torch():
    probe = "import sys, sparsify; print('torch' in sys.modules, sparsify.SparsityConfig(keep=0.3).keep)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False 0.3"
    assert {"convert", "load", "profile", "evaluate", "SparsityConfig"} <= set(dir(sparsify))


@pytest.mark.parametrize("device", ["xla", "abacus", "cuda:99", "meta", "c" * 500])
def test_a_device_that_cannot_compute_here_is_one_line(device, run, tmp_path):
    with pytest.raises(UsageError, match=r"^device [^\n]* cannot be used here; this machine has cpu") as error:
        sparsify.convert("digits", device=device, output=tmp_path / "m.safetensors")
    assert len(str(error.value)) < 200
    code, _, err = run("convert", "digits", "--device", device)
    assert code == 2 and err == f"error: {error.value.for_command_line()}\n" and err.startswith("error: --device ")


def test_a_device_that_is_not_here_is_refused_by_every_function(tmp_path):
    path = tmp_path / "digits.safetensors"
    model = sparsify.convert("digits", output=path, calib_images=2, spread="none").model
    for call in (sparsify.load, sparsify.profile, lambda *given, **how: sparsify.evaluate(*given, "digits", **how)):
        for given in (path,) if call is sparsify.load else (path, model):
            with pytest.raises(UsageError, match="^device xla cannot be used here"):
                call(given, device="xla")


def test_what_a_caller_gives_wrongly_is_one_line_that_names_arguments(tmp_path):
    long, output = "a" * 4000, tmp_path / "m.safetensors"
    calls = {
        "is a file, not a model name": lambda: sparsify.convert(tmp_path / "m.pth"),
        "trains on images: give them with data, or calibrate only (calibrate_only)": lambda: sparsify.convert(
            "digits", recipe="distill", output=output
        ),
        "give either target_macs or target_latency": lambda: sparsify.convert(
            "digits", target_macs=0.5, target_latency=0.5
        ),
        "unknown model 'aaa": lambda: sparsify.convert(long),
        "no recipe 'aaa": lambda: sparsify.convert("digits", recipe=long),
        "weights file aaa": lambda: sparsify.convert("digits", weights=long, output=output),
        "no file aaa": lambda: sparsify.load(long),
        "no file a\\x00": lambda: sparsify.load("a\0"),
        "a is not a model folder": lambda: sparsify.convert("local-dir:" + long),
    }
    for words, call in calls.items():
        with pytest.raises(SparsifyError, match=r"^[^\n]{1,1100}$") as error:
            call()
        assert words in str(error.value) and "--" not in str(error.value)
    assert sparsify.convert(Path("digits"), calib_images=2, output=output).path == output


def test_evaluate_also_computes_in_float64(tmp_path):
    made = sparsify.convert("digits", calib_images=4, spread="none", output=tmp_path / "m.safetensors")
    found = sparsify.evaluate(made.path, class_folders(tmp_path / "photos", "0123456789", 1), dtype=torch.float64)
    assert found.images == 10
    with pytest.raises(UsageError, match="dtype 'float64': expected one of float32, bfloat16, float16$"):
        sparsify.profile(made.path, dtype=torch.float64)
    assert made.calibration == "4 digits of the training split, because data was not given"


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_without_images_is_refused_and_not_taken_for_the_default(size, tmp_path):
    folder, refused = class_folders(tmp_path / "photos", "0123456789", 1), f"batch size {size}: expected 1 or more"
    made = sparsify.convert("digits", calib_images=4, spread="none", output=tmp_path / "m.safetensors")
    for call in (sparsify.profile, lambda m, **o: sparsify.evaluate(m, folder, **o), sparsify.export):
        with pytest.raises(UsageError, match=refused):
            call(made.path, batch_size=size)


def test_a_process_in_which_warnings_are_errors_loads_runs_and_profiles_without_one(tmp_path):
    """fvcore, whose torch.jit warns, is imported where MACs are counted, and there nothing reaches the user."""
    path = sparsify.convert("digits", output=tmp_path / "m.safetensors", calib_images=2, spread="none").path
    code = """
import sys, torch, sparsify
model = sparsify.load(sys.argv[1], backend="reference")
with torch.inference_mode():
    assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
assert "fvcore" not in sys.modules
assert sparsify.profile(model, measure=False).macs_sparse > 0
"""
    command = [sys.executable, "-W", "error", "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_default_dtype_of_the_caller_rounds_no_weights(tmp_path):
    def written(name: str) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
        path = tmp_path / name
        sparsify.convert("digits", keep=0.2, output=path, calib_images=8, spread="none")
        return load_file(path), sparsify.load(path)

    tensors, model = written("float32.safetensors")
    torch.set_default_dtype(torch.bfloat16)
    try:
        again, loaded = written("bfloat16.safetensors")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert {t.dtype for t in loaded.parameters()} == {torch.float32}
    assert all(map(torch.equal, model.parameters(), loaded.parameters()))
