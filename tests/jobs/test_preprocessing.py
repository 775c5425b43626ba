"""What a user says of preprocessing and classes reaches the file, and from there whatever reads it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import sparsify
from sparsify.cli.app import app
from sparsify.errors import SparsifyError
from sparsify.images import datasets
from sparsify.images.digits import scans
from sparsify.images.preprocessing import class_names

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A converted file that knows its classes, and test digits in folders by their names, 60 of them."""
    folder = tmp_path_factory.mktemp("digits")
    test = scans.Digits("test")
    for i in range(60):
        image, label = test[i]
        (folder / "images" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        image.save(folder / "images" / NAMES[label] / f"{i}.png")
    (folder / "names.txt").write_text("\n".join(NAMES))
    return folder, converted(folder / "m.safetensors", class_map=folder / "names.txt")


def converted(output, **given):
    return sparsify.convert("digits", keep="dense", output=output, calib_images=4, **given)


def test_converted_file_states_what_was_given(digits, tmp_path):
    given = dict(mean=(0.4,), std=(0.3, 0.3, 0.3), crop_pct=0.9, interpolation="nearest")
    made = converted(tmp_path / "m.safetensors", class_map=digits[0] / "names.txt", **given)
    model = sparsify.load(made.path)
    config = datasets.data_config(model)
    assert tuple(config["mean"]) == (0.4,) * 3 and tuple(config["std"]) == (0.3,) * 3
    assert config["crop_pct"] == 0.9 and config["interpolation"] == "nearest"
    assert class_names(model) == NAMES
    grey = datasets.transform(config)(Image.new("RGB", (40, 40), (102, 102, 102)))
    assert torch.allclose(grey, torch.zeros_like(grey), atol=1e-6)  # 102 / 255 is the mean


def test_eval_maps_folders_by_the_names_in_the_file_or_in_the_class_map(digits, tmp_path):
    folder, made = digits
    images, said = folder / "images", []
    result = sparsify.evaluate(made.path, images, say=said.append)
    assert "10 of 10 classes, by the names that the model has" in said
    plain = converted(tmp_path / "plain.safetensors")
    chance = sparsify.evaluate(plain.path, images, say=said.append)  # eight is class 0, ...
    assert chance.top1 < 30 < 80 < result.top1
    mapped = sparsify.evaluate(plain.path, images, class_map=folder / "names.txt")
    assert mapped.top1 > 80
    model = sparsify.load(plain.path)
    before = dict(model.pretrained_cfg)
    other = sparsify.evaluate(model, images, class_map=folder / "names.txt", crop_pct=0.5, interpolation="bilinear")
    assert (other.crop_pct, other.interpolation) == (0.5, "bilinear") and other.top1 < mapped.top1
    assert model.pretrained_cfg == before


def test_accuracy_by_chance_gets_a_line(digits, tmp_path):
    folder, made = digits
    (tmp_path / "wrong.txt").write_text("\n".join([*NAMES[1:], NAMES[0]]))  # each class one further: none is right
    said = []
    wrong = sparsify.evaluate(made.path, folder / "images", class_map=tmp_path / "wrong.txt", say=said.append)
    assert wrong.top1 < 10 and any("no better than chance (10.00 %)" in line and "class_map" in line for line in said)
    said.clear()
    sparsify.evaluate(made.path, folder / "images", say=said.append)
    assert not any("chance" in line for line in said)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": (0.0,)}, "std"),
        ({"mean": (float("nan"),)}, "mean"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"interpolation": "cubic"}, "one of nearest, bilinear"),
        ({"class_map": "none.txt"}, "no file none.txt"),
    ],
)
def test_what_no_preprocessing_has_is_refused(digits, given, words):
    with pytest.raises(SparsifyError, match=words) as error:
        sparsify.evaluate(digits[1].path, "digits", **given)
    assert "\n" not in str(error.value)


def test_class_map_of_another_number_of_classes_names_both(digits, tmp_path):
    (tmp_path / "x.txt").write_text("a\nb")
    with pytest.raises(SparsifyError, match="names 2 classes, but the model has 10"):
        sparsify.evaluate(digits[1].path, "digits", class_map=tmp_path / "x.txt")


def test_options_of_the_command_line(digits):
    folder, made = digits
    asked = [
        "eval",
        str(made.path),
        "--data",
        str(folder / "images"),
        "--crop-pct",
        "0.8",
        "--interpolation",
        "lanczos",
    ]
    results = folder / "r.json"
    done = CliRunner().invoke(app, [*asked, "--mean", "0.5,0.5,0.5", "--std", "0.5", "--results-file", str(results)])
    assert done.exit_code == 0, done.output
    assert '"crop_pct": 0.8' in results.read_text() and '"interpolation": "lanczos"' in results.read_text()
