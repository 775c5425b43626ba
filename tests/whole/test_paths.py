"""Paths are bytes: names that are not UTF-8 can be read, written and shown."""

import os
import shutil
from pathlib import Path

import pytest

import sparsify
from helpers import small_runs
from helpers.image_folders import class_folders
from sparsify.fit.finetune import saved_state
from sparsify.models.digits import network

LATIN = os.fsdecode(b"\xe9")


@pytest.fixture
def odd(tmp_path):
    """A name that is not UTF-8, where the file system has such names."""
    try:
        (tmp_path / LATIN).mkdir()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    return LATIN


def test_every_command_takes_them(run, tmp_path, odd):
    weights, images = Path(odd, "weights.safetensors"), Path(odd, "images")
    shutil.copy(Path(network.__file__).with_name("weights.safetensors"), tmp_path / weights)
    class_folders(tmp_path / images, "0123456789", 1)
    image = next((tmp_path / images).glob("*/*")).relative_to(tmp_path)
    model = f"{odd}/m{odd}.safetensors"
    for arguments in (
        (
            "convert",
            "digits",
            "--weights",
            weights,
            "--calib-images",
            1,
            "--data",
            images,
            "--calibrate-only",
            "-o",
            model,
        ),
        ("profile", model, "--dense", weights, "--no-measure", "--json", f"{odd}/profile.json"),
        ("eval", model, "--data", images, "--results-file", f"{odd}/results.json"),
        ("report", model, image, "--layer", 1, "--head", 1, "--eval", f"{odd}/results.json", "-o", f"{odd}/page.html"),
        ("push", model, "a/b", "--output", f"{odd}/repository"),
        ("profile", f"local-dir:{odd}/repository", "--no-measure"),
    ):
        code, out, err = run(*arguments)
        assert code == 0 and not [c for c in out + err if "\ud800" <= c <= "\udfff"], err


def test_a_model_is_saved_and_a_run_resumed(tmp_path, odd):
    made = small_runs.convert(tmp_path / odd / "m.safetensors", small_runs.recipe(stages=[]))
    saved = sparsify.save(sparsify.load(made.path), tmp_path / odd / f"{odd}.safetensors", like=made.path)
    assert saved.is_file() and sparsify.load(saved)
    state = saved_state.SavedState({"student.x": sparsify.load(saved).head.weight.detach()}, {"done": 1})
    saved_state.save(tmp_path / odd / "state.safetensors", state)
    assert saved_state.load(tmp_path / odd / "state.safetensors").facts == {"done": 1}
