"""What fine-tuning leaves on disk: the file, its header, the folder of the run; and the command that asks for it."""

import json

import timm
import torch
from safetensors.torch import load_file

import sparsify
from helpers import small_runs
from helpers.image_folders import class_folders
from helpers.small_runs import ATTENTION, recipe
from sparsify.images.digits import scans
from sparsify.jobs import convert as convert_job
from sparsify.jobs import dense
from sparsify.jobs import tune as tuning
from sparsify.models import checkpoint
from sparsify.models.digits import network
from sparsify.nn import execution
from sparsify.recipe import load_recipe, recipe_yaml

# predictors that learn, and what the file says


def test_learned_predictors_are_folded_into_the_file(tmp_path, scores, monkeypatch):
    scores += [1.0, 0.5]
    trained = []
    fold = tuning.fold
    monkeypatch.setattr(tuning, "fold", lambda model: trained.append(answers(model)) or fold(model))
    stage = {"train": "all", "losses": {"logits": 1.0, **ATTENTION}, "optimiser": {"lr": 1e-2}, "schedule": {}}
    made = small_runs.convert(tmp_path / "m.safetensors", recipe(stage, sparsity={"rank": ((9, 3),) * 4}))
    assert made.header.config.fold and not any("predictor" in name for name in small_runs.tensors(made.path))
    assert not torch.allclose(trained[0], answers(network.build()), atol=0.1)
    for model in (made.model, checkpoint.load(made.path)):
        assert torch.allclose(answers(model), trained[0], atol=1e-3 * float(trained[0].abs().max()))


def answers(model):
    x = torch.stack([image_of(i) for i in range(4)])
    with torch.inference_mode(), execution.sparse_form(model):
        return model(x)


def image_of(i):
    from torchvision.transforms.functional import pil_to_tensor, resize

    return pil_to_tensor(resize(scans.Digits("test")[i][0], [28, 28])) / 127.5 - 1


def test_predictors_that_cannot_be_folded_stay_in_the_file(tmp_path, scores):
    scores += [1.0, 0.5]
    stage = {"train": "predictors", "losses": ATTENTION, "ema": 0.5, "optimiser": {"lr": 1e-2}, "schedule": {}}
    made = small_runs.convert(tmp_path / "m.safetensors", recipe(stage))  # a mean of bases is no basis
    assert not made.header.config.fold
    assert sum("predictor" in name for name in small_runs.tensors(made.path)) == 8
    assert torch.equal(answers(checkpoint.load(made.path)), answers(made.model))


def test_the_header_tells_what_was_done(tmp_path, scores, monkeypatch):
    scores += [1.0, 0.5]
    chosen = recipe({})
    made = small_runs.convert(tmp_path / "m.safetensors", chosen)
    header = checkpoint.read_header(made.path)
    about = header.provenance
    assert header.backbone_changed and header.dense_sha256 == checkpoint.digest_of(network.build())
    assert about["recipe"] == chosen.model_dump(mode="json") and about["calibration"] == {"images": 8, "set": "user"}
    tuned = about["finetuned"]
    assert (tuned["steps"], tuned["stopped"], tuned["precision"], tuned["processes"]) == (3, "", "float32", 1)
    assert tuned["images"] == 1188 and tuned["start"]["images"] == 24
    assert "12 held-out images of digits" in tuned["judged_on"]
    scores[:] = [1.0, 0.5]
    alone = small_runs.convert(
        tmp_path / "p.safetensors", recipe({"train": "predictors", "losses": ATTENTION, "steps": 1})
    )
    assert alone.tuning.changed and not checkpoint.read_header(alone.path).backbone_changed
    scores[:] = [1.0, 0.5]
    fitted = small_runs.convert(tmp_path / "r.safetensors", recipe(repair={"images": 16}))
    assert fitted.tuning.changed and fitted.tuning.steps == 0 and fitted.header.backbone_changed
    assert [row["weights"] for row in small_runs.validations(fitted.run)] == ["start", "repaired"]
    assert (tuned["repair"], fitted.header.provenance["finetuned"]["repair"]) == (None, "done")


def test_least_squares_are_left_out_where_norms_stand_behind_attention(tmp_path, scores):
    """A recipe with `repair` converts such a model, says so, and its backbone is changed by stages alone."""
    shape = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 1, "num_classes": 3}
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_rpn_224", **shape)
    timm.models.save_for_hf(model, tmp_path / "post", safe_serialization=True, model_args=shape)
    photos = class_folders(tmp_path / "photos", "abc", 4)
    asked = load_recipe("distill").override(**small_runs.SMALL, rank=12, repair={"images": 8})
    for train, changed in (("attention", True), ("predictors", False)):
        losses = ATTENTION if train == "predictors" else {"features": 1.0}
        stage = asked.stages[0].model_dump() | {"steps": 1, "batch_size": 4, "train": train, "losses": losses}
        scores[:] = [1.0, 0.5]
        lines = []
        made = sparsify.convert(
            f"local-dir:{tmp_path / 'post'}",
            recipe=asked.override(stages=[stage]),
            data=photos,
            output=tmp_path / f"{train}.safetensors",
            say=lines.append,
        )
        about = checkpoint.read_header(made.path).provenance
        assert "repair left out: this model has norms after its attention and MLP" in lines
        assert about["finetuned"]["repair"] == "left out: this model has norms after its attention and MLP"
        assert not any("least squares" in line for line in lines)
        assert about["finetuned"]["kept"] == "fine-tuned" and about["backbone_changed"] is changed
        assert about["recipe"]["repair"] is not None  # as it was asked for


def test_the_folder_of_a_run_has_what_is_documented(tmp_path):
    made = small_runs.convert(tmp_path / "m.safetensors", recipe({"cache_teacher": True}), picture=True, save_minutes=0)
    found = sorted(path.name for path in made.run.iterdir())
    assert made.run == tmp_path / "m.run"
    assert found == [
        "curve.png", "metrics.csv", "model.safetensors", "recipe.yaml", "run.json", "tensorboard", "validation.csv",
    ]  # fmt: skip
    assert len(list((made.run / "tensorboard").glob("events.out.tfevents.*"))) == 1
    assert (made.run / "model.safetensors").read_bytes() == made.path.read_bytes()
    assert load_recipe(str(made.run / "recipe.yaml")) == recipe({"cache_teacher": True})
    assert json.loads((made.run / "run.json").read_text())["dense"] == made.header.dense_sha256
    assert (made.run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in small_runs.metrics(made.run)] == ["1", "2", "3"]
    again = small_runs.convert(tmp_path / "m.safetensors", recipe({"steps": 1}))  # a finished run needs no --force
    assert [row["step"] for row in small_runs.metrics(again.run)] == ["1"]


def test_options_of_the_command_reach_the_run(run, tmp_path):
    (tmp_path / "own.yaml").write_text(recipe_yaml(recipe({"steps": 1})))
    how = [
        "convert",
        "digits",
        "--recipe",
        "own.yaml",
        "--data",
        "digits",
        "--set",
        "stages.0.batch_size=4",
        "--seed",
        7,
    ]
    code, out, err = run(*how, "--set", "stages.0.losses.features=0.5", "--save-minutes", 0, "--micro-batch", 2)
    assert code == 0 and "wrote model.safetensors" in out and "; the run is in model.run" in out
    assert "distill 1 steps of 4; judged on 12 held-out images of digits" in " ".join(err.split())
    stored = load_recipe("model.run/recipe.yaml")
    assert (stored.stages[0].batch_size, stored.stages[0].losses.features, stored.seed) == (4, 0.5, 7)
    code, out, err = run(*how, "--calibrate-only", "-o", "c.safetensors")
    assert code == 0 and "fine-tuning" not in err and not (tmp_path / "c.run").exists()
    assert not checkpoint.read_header(tmp_path / "c.safetensors").backbone_changed
    assert "finetuned" not in checkpoint.read_header(tmp_path / "c.safetensors").provenance
    assert load_file(tmp_path / "c.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()


def test_with_images_the_default_is_to_learn_from_them(run, monkeypatch):
    chosen = []

    def convert(name, recipe, *arguments, **more):
        chosen.append(recipe)
        raise SystemExit(0)

    monkeypatch.setattr(convert_job, "convert", convert)
    for more in (["--data", "digits"], [], ["--data", "digits", "--calibrate-only"]):
        run("convert", "digits", *more)
    assert chosen == [load_recipe("distill"), load_recipe("calibrate"), load_recipe("calibrate")]


def test_a_recipe_that_learns_needs_images(run, monkeypatch, tmp_path):
    monkeypatch.setattr(dense, "calibrate", None)  # not reached
    code, out, err = run("convert", "digits", "--recipe", "distill")
    assert code == 2 and err.count("\n") == 1 and "--data" in err and "--calibrate-only" in err
    assert not list(tmp_path.iterdir())
