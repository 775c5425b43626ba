"""From a name to a fine-tuned file: the better one is kept, and no circumstance changes what comes out."""

import pytest
import torch

from helpers import small_runs
from helpers.error_lines import the_error
from helpers.small_runs import ATTENTION, recipe
from sparsify import api
from sparsify.fit.finetune import loop
from sparsify.fit.finetune import run as runs
from sparsify.fit.finetune.plan import TrainingData, make_plan
from sparsify.fit.finetune.validation import ValidationScore
from sparsify.images.digits import scans
from sparsify.jobs import tune as tuning
from sparsify.models import checkpoint
from sparsify.models.digits import network
from sparsify.nn import attention, graft
from sparsify.processes import Compute
from sparsify.recipe import load_recipe, recipe_yaml


def spied(monkeypatch, name="_step", take=lambda stage, found: None):
    """What `take` sees after each call of a method of the stages."""
    seen, whole = [], getattr(loop.StageRun, name)

    def call(self, *arguments):
        found = whole(self, *arguments)
        seen.append(take(self, found))
        return found

    monkeypatch.setattr(loop.StageRun, name, call)
    return seen


def student_of(stage, found):
    return {name: t.clone() for name, t in stage.student.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def close(run, other, relative=1e-5):
    for row, same in zip(small_runs.losses(run), small_runs.losses(other), strict=True):
        assert row == pytest.approx(same, rel=relative, abs=5e-8)  # float32: of a loss of 1e-4 a sum of terms near 1


# which weights are kept


def test_the_weights_that_judged_best_are_in_the_file(tmp_path, scores, monkeypatch):
    scores += [1.0, 0.8, 0.2, 0.5]  # start, then after each of three stages
    weights = spied(monkeypatch, "run", student_of)
    made = small_runs.convert(tmp_path / "m.safetensors", recipe(*[{"steps": 1}] * 3))
    assert made.tuning.changed and made.tuning.best.kl == 0.2 and made.tuning.steps == 3
    assert equal(small_runs.tensors(made.path), weights[1]) and equal(made.model.state_dict(), weights[1])
    assert not equal(weights[1], weights[2])
    finetuned = made.header.provenance["finetuned"]
    assert (finetuned["kept"], finetuned["start"]["kl"], finetuned["best"]["kl"]) == ("fine-tuned", 1.0, 0.2)
    assert [row["best"] for row in small_runs.validations(made.run)] == ["1", "1", "1", "0"]


@pytest.mark.parametrize("later", [1.0, 1.5, float("nan")])
def test_the_calibrated_model_is_kept_where_nothing_was_better(tmp_path, scores, later, monkeypatch):
    said, saved, save = [], [], checkpoint.save

    def spied_save(model, path, header):
        saved.append(({name: t.clone() for name, t in model.state_dict().items()}, header.config))
        save(model, path, header)

    monkeypatch.setattr(checkpoint, "save", spied_save)
    scores += [1.0, later]
    made = small_runs.convert(tmp_path / "m.safetensors", recipe({"steps": 2}), say=said.append)
    assert not made.tuning.changed and not made.header.backbone_changed
    (calibrated, config), _ = saved  # before the training, and at its end
    assert equal(small_runs.tensors(made.path), calibrated) and made.header.config == config
    assert made.header.provenance["finetuned"]["kept"] == "calibrated"
    assert said[-1].startswith("kept the calibrated model")


def test_top1_decides_before_kl():
    def score(top1, kl):
        return ValidationScore(kl, 90.0, top1, 24)

    assert score(90.0, 2.0).better_than(score(80.0, 1.0)) and not score(80.0, 1.0).better_than(score(90.0, 2.0))
    assert score(90.0, 1.0).better_than(score(90.0, 2.0)) and not score(90.0, 1.0).better_than(score(90.0, 1.0))
    assert score(None, 1.0).better_than(score(None, float("nan")))
    assert not score(99.0, float("nan")).better_than(score(1.0, 1.0))


def test_a_learning_rate_beyond_all_reason_leaves_the_best_and_one_line(run, tmp_path):
    how = ["--data", "digits", "--recipe", "own.yaml", "--set", "stages.0.optimiser.lr=1e30", "-o", "m.safetensors"]
    (tmp_path / "own.yaml").write_text(recipe_yaml(recipe({"steps": 4, "schedule": {}})))
    code, out, err = run("convert", "digits", *how, "--quiet")
    assert code == 1 and the_error(err).startswith("error: stage 'distill' stopped at step ")
    assert "not finite" in err and "m.safetensors has the best weights" in err and "wrote m.safetensors" in out
    header = checkpoint.read_header(tmp_path / "m.safetensors")
    assert header.provenance["finetuned"]["kept"] == "calibrated" and header.provenance["finetuned"]["stopped"]
    assert all(t.isfinite().all() for t in small_runs.tensors(tmp_path / "m.safetensors").values())
    assert api.load(tmp_path / "m.safetensors")(torch.zeros(1, 3, 28, 28)).isfinite().all()


def test_a_large_learning_rate_ends_with_the_calibrated_model(tmp_path):
    made = small_runs.convert(
        tmp_path / "m.safetensors", recipe({"steps": 2, "optimiser": {"lr": 10.0}, "schedule": {}})
    )
    assert not made.tuning.changed and made.tuning.best == made.tuning.start


def test_a_stop_between_keeps_the_model_its_own_share_of_keys(tmp_path, monkeypatch):
    whole = loop.StageRun._step
    monkeypatch.setattr(
        loop.StageRun, "_step", lambda self, *a: {"logits": float("inf")} if self.status.step else whole(self, *a)
    )
    stage = {"steps": 4, "keep": {"start": 1.0, "until": 1.0}, "drop_path": 0.3, "grad_checkpointing": True}
    monkeypatch.setattr(
        loop.RunStatus, "of", lambda start, resume: loop.RunStatus(*[ValidationScore(9.0, 1.0, None, 24)] * 2)
    )
    made = small_runs.convert(tmp_path / "m.safetensors", recipe(stage, repair={"images": 16}))
    assert made.tuning.stopped and made.tuning.changed
    assert {module.sparsity.keeps for module in attention.sparse_modules(made.model).values()} == {(0.1,)}


# what a stage does


def keep_of(module):
    (keep,) = module.sparsity.keeps
    return keep


def test_the_share_of_keys_is_annealed_to_the_models_own(tmp_path, monkeypatch):
    seen = spied(monkeypatch, "_step", lambda s, found: [*map(keep_of, attention.sparse_modules(s.student).values())])
    judged = []
    whole = loop.Validator.__call__

    def judge(self, model):
        judged.append(set(map(keep_of, attention.sparse_modules(model).values())))
        return whole(self, model)

    monkeypatch.setattr(loop.Validator, "__call__", judge)
    keeps = {"sparsity": {"keep": (0.1, 0.2, "dense", 1.0), "spread": "none"}}
    first = {"steps": 4, "keep": {"start": 0.6, "until": 0.5}}
    made = small_runs.convert(
        tmp_path / "m.safetensors", recipe(first, {"steps": 1}, {"steps": 1, "keep": 0.5}, **keeps)
    )
    expected = [[0.6, 0.6, 1.0], [0.35, 0.4, 1.0], [0.1, 0.2, 1.0], [0.1, 0.2, 1.0], [0.1, 0.2, 1.0], [0.5] * 3]
    assert [pytest.approx(row) for row in expected] == seen
    assert judged == [{0.1, 0.2, 1.0}] * 4
    assert [m.sparsity.keeps for m in attention.sparse_modules(made.model).values()] == [(0.1,), (0.2,), (1.0,)]


def test_the_running_mean_is_what_is_judged_and_kept(tmp_path, scores, monkeypatch):
    scores += [1.0, 0.5]
    weights = spied(monkeypatch, "_step", student_of)
    stage = {"steps": 3, "ema": 0.9, "optimiser": {"lr": 1e-2}, "schedule": {}}
    start = {}
    whole = runs.finetune

    def finetune(student, *arguments):
        start.update({name: t.clone() for name, t in student.state_dict().items()})
        return whole(student, *arguments)

    monkeypatch.setattr(tuning, "finetune", finetune)
    made = small_runs.convert(tmp_path / "m.safetensors", recipe(stage))
    kept = small_runs.tensors(made.path)
    for name, mean in start.items():
        for each in weights:
            mean = 0.9 * mean + 0.1 * each[name]
        assert torch.allclose(kept[name], mean, atol=1e-6), name
    assert not torch.allclose(kept["head.weight"], weights[-1]["head.weight"], atol=1e-4)
    assert [row["weights"] for row in small_runs.validations(made.run)] == ["start", "ema"]


def test_learning_rates_are_timms_by_step(tmp_path):
    stage = {"steps": 6, "schedule": {"warmup_share": 0.5, "min_lr": 1e-6}, "optimiser": {"lr": 1e-3}}
    made = small_runs.convert(tmp_path / "m.safetensors", recipe(stage))
    from timm.scheduler.cosine_lr import CosineLRScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, 6, lr_min=1e-6, warmup_t=3, warmup_lr_init=0.0, t_in_epochs=False)
    for step, row in enumerate(small_runs.losses(made.run)):
        scheduler.step_update(step)
        assert row["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_the_papers_stages_move_the_predictors_and_then_the_backbone(tmp_path, monkeypatch):
    steps = ["steps=2", "batch_size=8", "augmentation={form: eval}", "schedule={}"]
    chosen = load_recipe("paper").set(
        [f"stages.{i}.{s}" for i in (0, 1) for s in steps] + ["sparsity.rank=9", "hold_back=0.02"]
    )
    ends = spied(monkeypatch, "run", student_of)
    targets = spied(
        monkeypatch, "_step", lambda s, found: {n: t.clone() for n, t in s.teacher.model.state_dict().items()}
    )
    made = small_runs.convert(tmp_path / "m.safetensors", chosen)
    start, (one, two) = network.build().state_dict(), ends
    predictors = {name for name in one if ".predictor." in name}
    assert len(predictors) == 4 * 6 and one.keys() - predictors == start.keys()
    assert all(torch.equal(one[name], start[name]) for name in start)
    assert all(torch.equal(two[name], one[name]) for name in predictors)
    assert not any(torch.equal(two[name], one[name]) for name in start if "weight" in name)
    assert all(equal(weights, start) for weights in targets)
    drawn = graft.reset_predictors(graft.graft(network.build(), chosen.sparsity), 0).state_dict()
    moved = {name for name in predictors if not torch.equal(one[name], drawn[name])}
    assert moved == {name for name in predictors if not name.endswith("b_k")} or moved == predictors
    first, last = small_runs.metrics(made.run)[0], small_runs.metrics(made.run)[-1]
    assert first["attention"] and not first["logits"] and last["classification"] and not last["attention"]


@pytest.mark.parametrize("repair", [None, {"images": 8}])
def test_attention_is_the_dense_models_where_the_backbone_has_moved(tmp_path, monkeypatch, repair):
    asked = spied(monkeypatch, "_step", lambda s, found: s.teacher.pairs)
    alone = {"steps": 1, "train": "predictors", "attention": "dense", "losses": {**ATTENTION, "logits": 0, "tokens": 0}}
    small_runs.convert(tmp_path / "m.safetensors", recipe(alone, {"steps": 1}, alone, repair=repair))
    assert asked == [repair is not None, False, True]  # else the student's own is the same, and costs nothing


# circumstances that change nothing


def test_what_the_teacher_said_may_come_from_disk(tmp_path, monkeypatch):
    stage = {"steps": 4, "losses": {"classification": 1.0, "logits": 1.0, "tokens": 0.5}}
    small_runs.convert(tmp_path / "a.safetensors", recipe(stage))
    small_runs.convert(tmp_path / "b.safetensors", recipe({**stage, "cache_teacher": True}))
    close(tmp_path / "a.run", tmp_path / "b.run")
    assert not list((tmp_path / "b.run").glob("teacher-*"))


def test_an_epoch_from_the_cache_asks_the_teacher_for_nothing(tmp_path, monkeypatch):
    asked, whole = [], loop.Teacher.__call__
    monkeypatch.setattr(loop.Teacher, "__call__", lambda self, x: asked.append(len(x)) or whole(self, x))
    (tmp_path / "set").mkdir()
    for i in range(20):
        scans.Digits("test")[i][0].save(tmp_path / "set" / f"{i}.png")
    chosen = recipe({"steps": None, "epochs": 3, "cache_teacher": True}, hold_back=0.2)
    made = small_runs.convert(tmp_path / "m.safetensors", chosen, images=str(tmp_path / "set"))
    assert asked == [8, 8] and made.tuning.steps == 6  # 16 images to learn from, seen three times


@pytest.mark.parametrize("losses", [{"logits": 1.0}, {**ATTENTION, "features": 1.0}], ids=["output", "inside"])
def test_recomputing_blocks_changes_nothing(tmp_path, losses):
    for name, recompute in (("a", False), ("b", True)):
        stage = {"train": "all", "losses": losses, "grad_checkpointing": recompute}
        made = small_runs.convert(tmp_path / f"{name}.safetensors", recipe(stage))
        assert not made.model.grad_checkpointing
    close(tmp_path / "a.run", tmp_path / "b.run")


def test_images_computed_together_change_nothing(tmp_path):
    losses = {"classification": 1.0, "logits": 1.0, "tokens": 0.5, "features": 1.0, **ATTENTION}
    chosen = recipe({"train": "all", "losses": losses}, {"train": "all", "losses": {"attention": 0.01}})
    for micro in (2, 8):
        small_runs.convert(tmp_path / f"{micro}.safetensors", chosen, micro_batch=micro)
    close(tmp_path / "2.run", tmp_path / "8.run", 1e-4)


def test_validation_between_the_epochs_where_val_is_given(tmp_path):
    """validate_every null: every epoch is judged by images that the user named, by a few held back the last alone."""
    dense = network.build()
    chosen = recipe({"validate_every": None}, {"validate_every": 7})
    found = [
        [
            planned.validate_every
            for planned in make_plan(dense, chosen, TrainingData("digits", val), Compute(), "").stages
        ]
        for val in (None, "digits")
    ]
    assert found == [[0, 7], [1, 7]]
    made = small_runs.convert(
        tmp_path / "m.safetensors", recipe({"steps": 4, "batch_size": 500, "validate_every": None})
    )
    first, _ = small_runs.validations(made.run)  # before the first step, and after the second epoch
    assert first["weights"] == "start"


def test_least_squares_see_crops_where_there_are_fewer_images():
    """1188 digits to learn from: all of them, and crops of the first up to the number asked for."""
    repair = make_plan(network.build(), recipe(repair={"images": 1190}), TrainingData("digits"), Compute(), "").repair
    assert repair is not None
    x = torch.cat(list(repair[1]))
    assert len(x) == 1190 and not torch.equal(x[1188], x[0]) and not torch.equal(x[1189], x[1])
