"""A run that was stopped, by a signal or by force, and goes on: nothing of its result changes."""

import json

import pytest
import torch

from helpers import small_runs
from helpers.small_runs import CHOSEN, recipe
from sparsify import processes
from sparsify.errors import BadFile, Interrupted, UsageError
from sparsify.fit.calibrate.repair import repair
from sparsify.fit.finetune import loop, saved_state
from sparsify.fit.finetune import run as runs
from sparsify.fit.finetune.loop import Interrupts
from sparsify.fit.finetune.run_folder import RunFolder
from sparsify.fit.finetune.validation import ValidationScore


@pytest.fixture(autouse=True)
def latest(monkeypatch):
    """The latest weights are the best: what the last step gives is what is written."""
    monkeypatch.setattr(ValidationScore, "better_than", lambda self, other: True)


def stop_after(monkeypatch, steps):
    """Somebody asks to stop during the step of that number, of those done since the run began or went on."""

    class Stopped(Interrupts):
        looked = 0

        def __init__(self):
            self.former = {}

        @property
        def requested(self):
            self.looked += 1
            return self.looked == steps

    monkeypatch.setattr(runs, "Interrupts", Stopped)
    monkeypatch.setattr(runs, "repair", lambda sparse, dense, images, how, tell: repair(sparse, dense, images, how))


def test_a_run_that_is_stopped_before_its_first_step_goes_on(monkeypatch, tmp_path, undisturbed):
    output = tmp_path / "m.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "__enter__", lambda self: setattr(self, "requested", True) or self)
        assert "before the first step" in interrupted(output)
    same(undisturbed, small_runs.convert(output, CHOSEN, resume=True))


def interrupted(output, chosen=CHOSEN, **more):
    with pytest.raises(Interrupted) as caught:
        small_runs.convert(output, chosen, **more)
    assert caught.value.exit_code == 130 and processes.agreed(caught.value)
    return caught.value.for_command_line()


def same(made, other):
    one, two = small_runs.tensors(made.path), small_runs.tensors(other.path)
    assert one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())
    assert small_runs.metrics(made.run) == small_runs.metrics(other.run)
    assert small_runs.validations(made.run) == small_runs.validations(other.run)


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(undisturbed, tmp_path, monkeypatch, step):
    output, said = tmp_path / "m.safetensors", []
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        message = interrupted(output)
    assert f"after {step} of 6 steps" in message and "--resume" in message and "\n" not in message
    assert not output.exists() and [row["step"] for row in small_runs.metrics(tmp_path / "m.run")][-1] == str(step)
    made = small_runs.convert(output, CHOSEN, resume=True, say=said.append)
    assert any(line.startswith("resuming") and f"after {step} steps" in line for line in said)
    same(made, undisturbed)
    assert made.tuning.start == undisturbed.tuning.start and made.tuning.best == undisturbed.tuning.best


def test_a_run_may_be_stopped_again_and_again(undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "m.safetensors"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert "after 2 of" in interrupted(output)
        assert "after 4 of" in interrupted(output, resume=True)
    same(small_runs.convert(output, CHOSEN, resume=True), undisturbed)


def test_rows_of_steps_that_were_not_saved_are_written_anew(undisturbed, tmp_path, monkeypatch):
    output, whole = tmp_path / "m.safetensors", loop.StageRun._step

    def crash(self, *arguments):
        if self.status.done == 2:
            self._save()
        if self.status.done == 4:
            raise RuntimeError("power cut")
        return whole(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.StageRun, "_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            small_runs.convert(output, CHOSEN)
    assert len(small_runs.metrics(tmp_path / "m.run")) == 4
    same(small_runs.convert(output, CHOSEN, resume=True), undisturbed)


def test_a_run_without_a_saved_state_goes_on_from_its_calibrated_model(undisturbed, tmp_path, monkeypatch):
    output, said = tmp_path / "m.safetensors", []
    with monkeypatch.context() as patch:
        patch.setattr(loop.StageRun, "_step", lambda *a: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError, match="power cut"):
            small_runs.convert(output, CHOSEN)
    monkeypatch.setattr("sparsify.jobs.dense.calibrate", None)  # not again
    same(small_runs.convert(output, CHOSEN, resume=True, say=said.append), undisturbed)
    assert any("no saved state yet" in line for line in said)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "adan", "muon"])
def test_optimisers_are_packed_whole(name):
    from sparsify.fit.finetune import trainable
    from sparsify.recipe import Stage

    def steps(model, optimizer, count):
        for i in range(count):
            optimizer.zero_grad()
            model(torch.ones(2, 4) * (i + 1)).square().sum().backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        s = Stage(steps=1, losses={"logits": 1}, optimiser={"name": name, "lr": 1e-3})
        return model, trainable.make_optimiser(model, s)

    model, optimizer = fresh()
    steps(model, optimizer, 2)
    tensors, facts = saved_state.pack(optimizer)
    other, again = fresh()
    other.load_state_dict(model.state_dict())
    saved_state.unpack(again, {k: t.clone() for k, t in tensors.items()}, json.loads(json.dumps(facts)))
    steps(model, optimizer, 2), steps(other, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# what is refused


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    output = tmp_path / "m.safetensors"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        interrupted(output, recipe({}))
    return output


def test_another_run_is_not_resumed(unfinished, tmp_path):
    (tmp_path / "set").mkdir()
    from sparsify.images.digits import scans

    for i in range(12):
        scans.Digits("test")[i][0].save(tmp_path / "set" / f"{i}.png")
    for field, how in {
        "recipe.stages.0.optimiser.lr was 0.0001, is 0.5": {"chosen": recipe({"optimiser": {"lr": 0.5}})},
        "recipe.stages.0.steps was 3, is 4": {"chosen": recipe({"steps": 4})},
        "recipe.stages was": {"chosen": recipe({}, {})},
        "recipe.seed was 0, is 1": {"chosen": recipe({}, seed=1)},
        "data was": {"images": str(tmp_path / "set")},
        "val was": {"val": "digits"},
    }.items():
        with pytest.raises(UsageError) as caught:
            small_runs.convert(unfinished, how.pop("chosen", recipe({})), resume=True, **how)
        assert field in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert small_runs.convert(unfinished, recipe({}), resume=True).tuning.steps == 3  # it was not harmed


def test_an_unfinished_run_is_not_thrown_away_unasked(unfinished, tmp_path, monkeypatch):
    before = (unfinished.with_name("m.run") / "state.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("sparsify.jobs.dense.calibrate", None)  # refused before
        with pytest.raises(BadFile) as caught:
            small_runs.convert(unfinished, recipe({"steps": 1}))
    for word in ("m.run holds an unfinished run", "--resume", "--force", "--output"):
        assert word in caught.value.for_command_line()
    assert (unfinished.with_name("m.run") / "state.safetensors").read_bytes() == before
    made = small_runs.convert(unfinished, recipe({"steps": 1}), force=True)
    assert made.tuning.steps == 1 and not RunFolder(made.run).unfinished


def test_with_nothing_to_resume_a_run_begins(tmp_path):
    said = []
    made = small_runs.convert(tmp_path / "m.safetensors", recipe({"steps": 1}), resume=True, say=said.append)
    assert made.tuning.steps == 1 and any("nothing to resume" in line and "from the beginning" in line for line in said)
    again = small_runs.convert(tmp_path / "m.safetensors", recipe({"steps": 1}), resume=True, say=said.append)
    assert again.tuning.steps == 1  # a finished run is nothing to resume


def test_a_damaged_state_is_one_line(unfinished):
    (unfinished.with_name("m.run") / "state.safetensors").write_bytes(b"half")
    with pytest.raises(BadFile, match="is not a saved run") as caught:
        small_runs.convert(unfinished, recipe({}), resume=True)
    assert caught.value.for_command_line().endswith("--force")
