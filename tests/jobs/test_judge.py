"""What judges a fine-tuning is independent: no image that it is scored on was calibrated on or learnt from."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from helpers import small_runs
from helpers.small_runs import recipe
from sparsify.errors import as_arguments
from sparsify.fit.finetune import run
from sparsify.fit.finetune.plan import TrainingData, make_plan
from sparsify.images import datasets
from sparsify.images.folders import Files
from sparsify.images.loaders import Mapped
from sparsify.images.trainset import trainset
from sparsify.jobs.dense import Calibrator
from sparsify.models.digits import network
from sparsify.processes import Compute


@pytest.fixture
def seen(monkeypatch):
    """Names of the images that each of calibration ('fit'), training ('learn') and validation ('judge') opens."""
    opened, phase = defaultdict(set), ["learn"]

    def inside(function, name):
        def call(*args, **kwargs):
            phase.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                phase.pop()

        return call

    def recorded(fetch):
        return lambda self, index: (opened[phase[-1]].add(self.name(index)), fetch(self, index))[1]

    for name, method in (("fit", "calibrate"), ("fit", "sensitivity")):
        monkeypatch.setattr(Calibrator, method, inside(getattr(Calibrator, method), name))
    monkeypatch.setattr(run.Validator, "__call__", inside(run.Validator.__call__, "judge"))
    for items in (Mapped, Files):
        monkeypatch.setattr(items, "fetch", recorded(items.fetch))
    return opened


def photographs(root: Path, count: int) -> Path:
    """`count` noise images in ROOT/CLASS/, of 10 classes; their numbers in `val` start at 100."""
    for i in range(count):
        path = root / str(i % 10) / f"{i + 100 * (root.name == 'val')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((28, 28), 90).convert("RGB").save(path)
    return root


CHOSEN = recipe({"steps": 2}, calib_images=64, hold_back=0.2, repair={"images": 16})


def test_the_digits_that_judge_are_not_fitted_to(tmp_path, seen):
    small_runs.convert(tmp_path / "m.safetensors", CHOSEN.model_copy(update={"hold_back": 0.04}))
    assert len(seen["fit"]) == 64 and len(seen["judge"]) == 48 and len(seen["learn"]) > 16
    assert not seen["judge"] & (seen["fit"] | seen["learn"])


def test_in_a_folder_of_photographs_what_judges_is_not_fitted_to(tmp_path, seen):
    """As in the README: one folder, and more images to calibrate on than are left to learn from."""
    lines: list[str] = []
    folder = photographs(tmp_path / "photos", 50)
    made = small_runs.convert(tmp_path / "m.safetensors", CHOSEN, images=str(folder), say=lines.append)
    assert len(seen["judge"]) == 10 and len(seen["fit"]) == 40
    assert not seen["judge"] & (seen["fit"] | seen["learn"]) and len(seen["judge"] | seen["fit"]) == 50
    judged_on = made.header.provenance["finetuned"]["judged_on"]
    assert judged_on.startswith("10 held-out images of ")
    (warning,) = (line for line in lines if line.startswith("warning"))
    assert "10 validation images" in warning and "hold_back" in warning


@pytest.mark.parametrize("trains", [True, False])
def test_beside_val_only_train_is_calibrated_on(tmp_path, seen, trains):
    root = tmp_path / "photos"
    photographs(root / "train", 20)
    photographs(root / "val", 10)
    chosen, val = (CHOSEN, str(root)) if trains else (CHOSEN.without_training(), None)
    lines: list[str] = []
    small_runs.convert(tmp_path / "m.safetensors", chosen, images=str(root), val=val, say=lines.append)
    splits = [as_arguments(line).split("; ")[0] for line in lines if ": the images of " in line]
    assert splits == [f"data: the images of {root}/train", f"val: the images of {root}/val"][: 1 + trains]
    train, judges = seen["fit"] | seen["learn"], seen["judge"]
    assert {Path(name).stem for name in train} == {str(i) for i in range(20)}
    assert {Path(name).stem for name in judges} == ({str(i) for i in range(100, 110)} if trains else set())


def test_a_stream_calibrates_after_the_images_that_it_holds_back(monkeypatch):
    class Numbers(IterableDataset):
        def __iter__(self):
            return ((Image.new("RGB", (4, 4), (i, 0, 0)), i) for i in range(10))

        def __len__(self):
            return 10

    monkeypatch.setattr(datasets, "create_dataset", lambda *args, **options: Numbers())
    found = trainset("wds/x", hold_back=0.2)
    reds = [x[:, 0, 0, 0] for x in found.calibration(3, 0, lambda image: torch.tensor([[[image.getpixel((0, 0))[0]]]]))]
    assert torch.cat(reds).tolist() == [2, 3, 4]
    assert len(list(found.held)) == 2


@pytest.mark.parametrize("hold_back, warned", [(0.04, True), (0.042, False)])
def test_fewer_than_50_images_to_judge_by_are_a_warning(hold_back, warned):
    """Of 1,200 digits 48 or 50 are held back; of those that the user names, as many are expected."""
    model, data = network.build(pretrained=False), TrainingData("digits")
    plan = make_plan(model, recipe({}, hold_back=hold_back), data, Compute(), "")
    assert plan.warning.startswith("warning: 48 validation images" if warned else "") and bool(plan.warning) == warned
    assert not make_plan(model, recipe({}), replace(data, val="digits"), Compute(), "").warning


def test_named_images_to_judge_by_that_are_learnt_from_are_a_warning(tmp_path):
    """However both are named: here by a link."""
    model = network.build(pretrained=False)
    photographs(tmp_path, 30)
    (tmp_path / "link").symlink_to(tmp_path)
    plan = make_plan(model, recipe({}), TrainingData(str(tmp_path), str(tmp_path / "link")), Compute(), "")
    assert plan.warning.startswith("warning: 30 of the validation images are also trained on") and "val" in plan.warning
