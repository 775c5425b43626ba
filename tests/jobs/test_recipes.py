"""The recipes that come with the package, and bad ones: each is one line before anything is computed."""

import shutil

import pytest
import timm
import yaml
from safetensors.torch import save_file

from helpers import small_runs
from helpers.error_lines import the_error
from helpers.image_folders import class_folders
from sparsify.errors import UsageError
from sparsify.jobs import dense
from sparsify.models import pretrained
from sparsify.models.digits import network
from sparsify.nn import graft
from sparsify.recipe import default_recipe, load_recipe, recipe_names, recipe_text, recipe_yaml

NAMES = ("calibrate", "distill", "paper", "paper-calibrated", "paper-digits")


def test_every_recipe_is_listed_with_what_it_is(run):
    code, out, err = run("recipes")
    lines = out.splitlines()
    assert code == 0 and set(NAMES) <= set(recipe_names()) and len(lines) == len(recipe_names())
    for name, line in zip(recipe_names(), lines, strict=True):
        description = load_recipe(name).description
        assert line == f"{name}  {description}" and 10 < len(description) < 100


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_shown_is_the_recipe(run, tmp_path, name):
    code, out, _ = run("recipes", "show", name)
    assert code == 0 and out == recipe_text(name) and out.startswith("# ")
    (tmp_path / "copy.yaml").write_text(out)
    chosen = load_recipe(name)
    assert load_recipe("copy.yaml") == chosen
    (tmp_path / "resolved.yaml").write_text(recipe_yaml(chosen))
    assert load_recipe("resolved.yaml") == chosen
    assert chosen.set([]) == chosen and chosen.override() == chosen
    assert not chosen.without_training().trains


def test_the_default_learns_where_there_are_images():
    assert (default_recipe(True), default_recipe(False)) == ("distill", "calibrate")
    assert load_recipe("distill").trains and not load_recipe("calibrate").trains
    assert not load_recipe("distill").stages[0].losses.classification  # no labels needed


PAPER = {
    "start": "random",
    "precision": "float32",
    "repair": None,
    "sparsity.predictor": "token-lowrank",
    "sparsity.keep": 0.25,
    "sparsity.rank": 32,
    "sparsity.tail": "none",
    "sparsity.tokens": None,
    "sparsity.token_lowrank": {
        "channels": 32, "scale": "heads", "coef_topk": 8, "coef_threshold": None, "basis": "absolute",
        "basis_threshold": 0.02, "shared_projection": False, "shared_heads": True,
    },
    "stages.0.train": "predictors",
    "stages.0.attention": "dense",
    "stages.0.epochs": 5,
    "stages.0.losses": {
        "classification": 0, "logits": 0, "temperature": 1, "tokens": 0, "features": 0, "attention": 0.01,
        "attention_form": "mse-sum", "attention_blocks": "mean", "mass": 0, "attention_target": "teacher",
        "coefficients": "all", "basis": "raw", "basis_l1": 0, "reference_batch": 168,
    },
    "stages.0.optimiser.lr": 3e-4,
    "stages.0.schedule": {"name": "cosine", "warmup": 3, "warmup_share": 0, "warmup_lr": 0, "min_lr": 2e-4},
    "stages.1.train": "backbone",
    "stages.1.attention": "sparse",
    "stages.1.epochs": 45,
    "stages.1.losses.classification": 1.0,
    "stages.1.losses.logits": 0.5,
    "stages.1.losses.temperature": 1.0,
    "stages.1.losses.tokens": 0.5,
    "stages.1.losses.features": 0,
    "stages.1.losses.attention": 0,
    "stages.1.losses.basis_l1": 0,
    "stages.1.optimiser.lr": 8e-5,
    "stages.1.schedule": {"name": "cosine", "warmup": 3, "warmup_share": 0, "warmup_lr": 0, "min_lr": 2e-6},
}  # fmt: skip
BOTH = {
    "steps": None,
    "batch_size": 1344,
    "optimiser.name": "adamw",
    "optimiser.betas": [0.9, 0.999],
    "optimiser.eps": 1e-8,
    "optimiser.weight_decay": 0.05,
    "optimiser.clip_grad": None,
    "optimiser.layer_decay": None,
    "ema": 0.9999,
    "keep": None,
    "drop_path": 0,
    "cache_teacher": False,
    "augmentation": {
        "form": "train", "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "hflip": 0.5, "color_jitter": 0.4,
        "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0,
        "mixup_prob": 1.0, "mixup_switch": 0.5, "smoothing": 0.1,
    },
}  # fmt: skip
TABLE = PAPER | {f"stages.{i}.{field}": value for i in (0, 1) for field, value in BOTH.items()}


@pytest.mark.parametrize("field", TABLE)
def test_the_paper_recipe_is_the_papers(field):
    value = load_recipe("paper").model_dump(mode="json")
    for name in field.split("."):
        value = value[int(name)] if isinstance(value, list) else value[name]
    assert value == TABLE[field]


def test_the_paper_recipe_has_two_stages():
    assert [stage.name for stage in load_recipe("paper").stages] == ["reconstruct", "distill"]


def test_fields_are_set_by_their_paths():
    chosen = load_recipe("paper").set(
        [
            "stages.1.epochs=2.5",
            "sparsity.keep=[0.1, dense]",
            "stages.0.augmentation={form: eval}",
            "repair={images: 9}",
        ]
    )
    assert chosen.stages[1].epochs == 2.5 and chosen.stages[0].epochs == 5 and chosen.sparsity.keep == (0.1, "dense")
    assert chosen.stages[0].augmentation.form == "eval" and not chosen.stages[0].augmentation.mixes
    assert chosen.repair.images == 9 and chosen.set(["repair=null", "stages=[]"]).trains is False
    assert chosen.set(["stages.0.name=a=b"]).stages[0].name == "a=b"


# bad recipes


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch, request):
    def fail(*arguments, **more):
        raise AssertionError("calibration was entered")

    monkeypatch.setattr(dense, "calibrate", fail)
    monkeypatch.setattr(graft, "reset_predictors", fail)


def refused(run, tmp_path, code, *words, how=()):
    found, out, err = run("convert", "digits", "-o", "m.safetensors", *how)
    assert found == code and the_error(err), (found, err)
    assert "wrote" not in out and "unexpected" not in err
    assert not list(tmp_path.glob("m.*"))
    for word in words:
        assert word in err, err


def written(tmp_path, stage=None, **changes):
    tree = small_runs.recipe({}).model_dump(mode="json") | changes
    tree["stages"][0] |= stage or {}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    return ["--recipe", "own.yaml", "--data", "digits"]


def with_text(tmp_path, text):
    (tmp_path / "own.yaml").write_text(text)
    return ["--recipe", "own.yaml", "--data", "digits"]


ONLY = {"logits": 0.0, "tokens": 0.0}
BAD = {
    "unknown key": ({"learning_rate": 1}, ["stages.0: unknown field 'learning_rate'; known: name, train"]),
    "unknown key inside": ({"optimiser": {"momentun": 1}}, ["stages.0.optimiser: ", "'momentun'; did you mean momentum?"]),
    "wrong type": ({"batch_size": "many"}, ["stages.0.batch_size: expected a whole number (given: 'many')"]),
    "wrong choice": ({"train": "head"}, ["stages.0.train", "'predictors', 'attention', 'backbone' or 'all'"]),
    "out of range": ({"optimiser": {"lr": -1.0}}, ["stages.0.optimiser.lr: expected a number above 0 (given: -1.0)"]),
    "no losses": ({"losses": ONLY}, ["'distill' trains nothing", "every loss has weight 0"]),
    "predictors without a loss": ({"train": "predictors"}, ["trains nothing", "attention, mass and basis_l1"]),
    "backbone without a loss": ({"losses": {**ONLY, "attention": 1.0}}, ["trains nothing", "tokens or features"]),
    "attention without a loss": (
        {"train": "attention", "losses": {**ONLY, "attention": 1.0}}, ["trains nothing", "tokens or features"],
    ),
    "basis of another predictor": (
        {"train": "predictors", "losses": {**ONLY, "basis_l1": 1.0}}, ["basis_l1", "head-lowrank"],
    ),
    "no length": ({"steps": None}, ["neither epochs nor steps"]),
    "cache and augmentation": ({"cache_teacher": True, "augmentation": {}}, ["cache_teacher", "form eval"]),
    "cache and attention": (
        {"cache_teacher": True, "train": "all", "losses": {"attention": 1.0}}, ["cache_teacher", "attention"],
    ),
    "odd mixup": ({"batch_size": 7, "augmentation": {"mixup": 1.0}}, ["even batch_size", "7"]),
    "unknown optimiser": ({"optimiser": {"name": "adamant"}}, ["optimiser 'adamant'"]),
    "unknown augmentation": ({"augmentation": {"form": "train", "auto_augment": "magic"}}, ["magic"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_stage_is_one_line(run, tmp_path, case):
    stage, words = BAD[case]
    refused(run, tmp_path, 2, *words, how=written(tmp_path, stage))


def test_predictors_of_a_dense_model_are_nothing_to_train(run, tmp_path):
    stage = {"train": "predictors", "losses": {"attention": 1.0}}
    how = written(tmp_path, stage)
    refused(run, tmp_path, 2, "trains nothing", "keep dense", how=[*how, "--keep", "dense"])
    refused(run, tmp_path, 2, "attention: dense", how=[*how, "--token-keep", "0.7", "--token-stages", 2])


def test_a_file_that_is_no_recipe_is_one_line(run, tmp_path):
    refused(run, tmp_path, 2, "own.yaml cannot be read as YAML: line 1: ", how=with_text(tmp_path, "a: [1"))
    refused(run, tmp_path, 2, "own.yaml", how=with_text(tmp_path, "- 1\n- 2\n"))
    refused(run, tmp_path, 2, "stages", how=with_text(tmp_path, "stages: 3\n"))
    refused(run, tmp_path, 2, "own.yaml: unknown field 'epoch'; known: desc", how=with_text(tmp_path, "epoch: 3\n"))
    refused(run, tmp_path, 2, "no recipe 'lost'", "distill", how=["--recipe", "lost", "--data", "digits"])


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("stages.0.epoch=3", ["unknown field 'epoch'; did you mean epochs?"]),
        ("stages.5.epochs=3", ["no item '5' in the list, which has 1, counted from 0"]),
        ("stages.first.epochs=3", ["no item 'first'"]),
        ("repair.images=3", ["no field 'images', as what stands there is None"]),
        ("stages.0.epochs.more=3", ["no field 'more', as what stands there is 30"]),
        ("stages.0.epochs", ["FIELD=VALUE"]),
        ("=3", ["FIELD=VALUE"]),
        ("stages.0.epochs=[", ["not a YAML value"]),
        ("stages.0.epochs=none", ["stages.0.epochs", "'none'"]),
        ("seed=-1", ["seed"]),
        ("sparsity.keep=2", ["keep"]),
    ],
)
def test_an_assignment_that_does_not_fit_is_one_line(run, tmp_path, assignment, words):
    refused(run, tmp_path, 2, "--set", *words, how=["--recipe", "distill", "--data", "digits", "--set", assignment])


@pytest.mark.parametrize("name", ["calibrate", "distill"])
def test_the_paper_start_is_of_its_own_predictor(run, tmp_path, name):
    refused(run, tmp_path, 2, "start random", how=["--recipe", name, "--data", "digits", "--set", "start=random"])


def test_weights_of_another_model_are_one_line(run, tmp_path):
    other = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    refused(run, tmp_path, 1, "other.safetensors", how=[*written(tmp_path), "--weights", "other.safetensors"])
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    refused(run, tmp_path, 1, "other.safetensors", how=[*written(tmp_path), "--weights", "other.safetensors"])


def test_images_that_do_not_fit_are_one_line(run, tmp_path):
    how = written(tmp_path, {"losses": {"classification": 1.0}})[:2]
    (tmp_path / "empty").mkdir()
    refused(run, tmp_path, 1, "empty", how=[*how, "--data", "empty"])
    refused(run, tmp_path, 1, "nowhere", how=[*how, "--data", "nowhere"])
    class_folders(tmp_path / "three", "abc", 10)
    refused(run, tmp_path, 1, "three has 3 classes, but the model has 10", how=[*how, "--data", "three"])
    refused(
        run, tmp_path, 1, "three has 3 classes, but the model has 10", how=[*how, "--data", "digits", "--val", "three"]
    )
    shutil.copytree(tmp_path / "three" / "a", tmp_path / "flat")
    refused(run, tmp_path, 1, "flat", how=[*how, "--data", "flat"])  # no labels
    unlabelled = written(tmp_path)[:2]
    class_folders(tmp_path / "eight", ["x"], 8)  # one is held back
    refused(run, tmp_path, 1, "batch of 8 is larger than the 7 images", how=[*unlabelled, "--data", "eight"])
    refused(run, tmp_path, 2, "hold_back 0", "--val", how=[*unlabelled, "--data", "digits", "--set", "hold_back=0"])


def test_classes_cannot_be_learned_without_a_head(tmp_path, monkeypatch):
    chosen = small_runs.recipe({"losses": {"classification": 1.0}})
    model = network.build()
    model.reset_classifier(0)
    monkeypatch.setattr(pretrained, "load", lambda *a: model)
    with pytest.raises(UsageError, match="classification needs a model with classes") as caught:
        small_runs.convert(tmp_path / "m.safetensors", chosen)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_float16_needs_a_gpu(run, tmp_path):
    refused(run, tmp_path, 2, "float16 needs a GPU", how=[*written(tmp_path), "--set", "precision=float16"])


def test_recipes_do_not_change():
    chosen = load_recipe("distill")
    with pytest.raises(Exception, match="frozen"):
        chosen.seed = 3
