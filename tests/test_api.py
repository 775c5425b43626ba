"""The four functions of the library, as its docstring shows them."""

import subprocess
import sys

import pytest

import sparsify


def test_convert_load_profile_evaluate(tmp_path):
    path = tmp_path / "digits.safetensors"
    made = sparsify.convert("digits", keep=0.2, output=path, calib_images=8, spread_rank=False)
    assert made.path == path and made.header.config.keep == 0.2
    model = sparsify.load(path)
    figures = sparsify.profile(model, measure=False).as_dict()
    assert figures["macs_sparse"] < figures["macs_dense"]
    result = sparsify.evaluate(model, "digits", batch_size=64)
    assert result.images == 597 and result.agreement > 98
    with pytest.raises(Exception, match="keep"):
        sparsify.convert("digits", keep=2, output=path)


def test_importing_the_package_does_not_import_torch():
    probe = "import sys, sparsify; print('torch' in sys.modules, sparsify.SparsityConfig(keep=0.3).keep)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False 0.3"
    assert {"convert", "load", "profile", "evaluate", "SparsityConfig"} <= set(dir(sparsify))
