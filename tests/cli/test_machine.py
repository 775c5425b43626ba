"""`--version` and `doctor`: what answers depend on, what is missing, and what to type."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch

from sparsify.cli import machine
from sparsify.extras import EXTRAS
from sparsify.ops.cpu import build, kernels, processor
from sparsify.version import __version__


def test_version_names_what_answers_depend_on(run):
    code, out, err = run("--version")
    own, packages, here, _ = out.splitlines()
    assert (code, own, err) == (0, f"sparsify {__version__}", "")
    for name in ("torch", "torchvision", "timm"):
        assert f"{name} {metadata.version(name)}" in packages
    assert processor.name() in here and out.splitlines()[3] == f"CPU kernels: {build.state()}"


def test_version_takes_less_than_a_second_of_the_processor():
    used = (
        "import resource, sys; from sparsify.cli.app import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
    )
    used += "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", used], capture_output=True, text=True, check=True).stdout
    seconds, torch_too = out.splitlines()[-1].split()
    assert float(seconds) < 1 and torch_too == "False"


def test_the_instruction_set_is_the_one_that_the_library_finds():
    if reason := kernels.available():
        pytest.skip(reason)
    best = kernels.ISAS[int(torch.ops.sparsify_cpu.best_isa())]
    assert processor.isa() == ("" if best == "none" else best)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("sse2", ""),
        ("avx2 fma bmi1 bmi2", "avx2"),
        ("avx2 fma bmi1", ""),
        ("avx2 fma bmi1 bmi2 avx512f avx512bw avx512dq avx512vl avx512_bf16", "avx512"),
    ],
)
def test_an_instruction_set_needs_all_its_flags(flags, expected, monkeypatch):
    monkeypatch.setattr(processor, "_cpuinfo", lambda: {"flags": flags})
    assert processor.isa() == expected


def test_doctor_says_what_is_missing_and_what_to_type(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, out, err = run("doctor")
    assert (code, err) == (0, "") and out.startswith(f"sparsify {__version__}\n")
    export, int8 = [line for line in out.splitlines() if "missing" in line]
    assert export.startswith("ONNX: onnx ") and export.endswith(
        "onnxscript missing: pip install 'sparsify-vit[export]'"
    )
    assert int8 == "OpenVINO in int8: nncf missing: pip install 'sparsify-vit[int8]'"


def test_doctor_knows_every_extra_and_an_unusable_cache(run, monkeypatch, tmp_path):
    assert set(machine.FOR) == set(EXTRAS)
    (tmp_path / "cache").write_bytes(b"a file")
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    code, out, _ = run("doctor")
    assert code == 0 and f"cache: {tmp_path / 'cache'}, 0.0 MB" in out


def test_kernels_that_came_with_the_package_are_used_and_nothing_is_compiled(tmp_path, monkeypatch):
    library = tmp_path / "lib.so"
    library.write_bytes(b"")
    monkeypatch.setattr(build, "PREBUILT", library)
    monkeypatch.setattr(build, "find_compiler", lambda: 1 / 0)
    assert build.state() == "came with the package"
    assert build.build(prebuilt=library) == build.build(prebuilt=library, force=True) == build.Built(library)


def test_without_compiler_and_library_the_state_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "none.so")
    assert "install g++" in build.state()
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    assert build.state() == f"not compiled yet: {tmp_path / 'c++'} does it at first use"


def test_a_library_of_the_package_that_does_not_load_is_compiled(tmp_path, monkeypatch):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    asked = []

    def built(say, prebuilt):
        asked.append(prebuilt)
        return build.Built(broken) if prebuilt else build.Built(None, "no compiler here")

    monkeypatch.setattr(build, "PREBUILT", broken)
    monkeypatch.setattr(build, "build", built)
    assert kernels._find() == (0, "no compiler here") and asked == [broken, None]
