"""`auto` of whole models: held against dense attention once, on copies, and dense where that is faster."""

import copy
import itertools
import json
import pickle
import time

import pytest
import torch
from torch import nn

from helpers.families import build, images
from sparsify.config import SparsityConfig, Tokens
from sparsify.nn import graft, guard, schedules
from sparsify.nn.execution import sparse_form
from sparsify.ops import auto, backends
from sparsify.ops.auto import Race

NOISE = 1e-5


@pytest.fixture
def races(tmp_path, monkeypatch):
    """Pretended races in an empty cache: every call is fastest in its sparse form; whole models take `ms`."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(backends, "not_built", lambda: "not here")

    class Races(list):
        def __init__(self):
            self.ms, self.own = {"decided": 10.0, "dense": 9.0}, 1.0

    found = Races()

    def race(runs, clock, *rest):
        if "decided" not in runs:
            return Race({name: 2.0 if name == "sdpa" else 1.0 for name in runs}, 7, 1.0)
        for run in runs.values():
            run()
        found.append(tuple(runs))
        return Race(dict(found.ms), 7, found.own)

    monkeypatch.setattr(auto, "race", race)
    return found


def model(tokens=None) -> nn.Module:
    made = graft.graft(build("deit", depth=2), SparsityConfig(keep=0.3, rank=4, cells=(2, 2), tokens=tokens))
    return made.requires_grad_(False)


def is_dense(found: torch.Tensor, of: nn.Module, x: torch.Tensor) -> bool:
    with torch.inference_mode():
        dense = schedules.densely(of)(x)
        with sparse_form(of):
            sparse = of(x)
    assert (dense - sparse).abs().max() > 100 * NOISE
    assert min((found - dense).abs().max(), (found - sparse).abs().max()) < NOISE
    return bool((found - dense).abs().max() < NOISE)


@pytest.mark.parametrize("decided, dense, taken", [(10.0, 9.0, True), (9.1, 9.0, False), (8.0, 9.0, False)])
def test_dense_attention_is_taken_where_the_whole_model_is_faster_by_more_than_two_percent(
    races, decided, dense, taken
):
    mine = model()
    races.ms = {"decided": decided, "dense": dense}
    guard.set_backend(mine, "auto")
    x = images(mine, 2)
    for _ in range(2):
        assert is_dense(mine(x), mine, x) == taken
    assert races == [("decided", "dense")]


def test_it_is_measured_once_on_a_machine_and_for_each_call(races, tmp_path):
    for _ in range(2):
        mine = model()
        guard.set_backend(mine, "auto")
        for count in (1, 2, 1):
            assert is_dense(mine(images(mine, count)), mine, images(mine, count))
    assert len(races) == 2
    (file,) = (tmp_path / "auto").iterdir()
    kept = json.loads(file.read_text())
    whole = [key for key in kept["choices"] if key.startswith("VisionTransformer of ")]
    assert len(whole) == 2 and all(kept["choices"][key]["slower"] for key in whole)
    kept["choices"] |= {key: {"slower": "yes"} for key in whole}
    file.write_text(json.dumps(kept))
    guard.set_backend(mine := model(), "auto")
    mine(images(mine, 1))
    assert len(races) == 3


def test_a_busy_processor_is_asked_again_and_nothing_is_written(races, tmp_path, monkeypatch):
    mine, now = model(), itertools.count()
    guard.set_backend(mine, "auto")
    x, races.own = images(mine, 1), 0.5
    monkeypatch.setattr(time, "perf_counter", lambda: 11.0 * next(now))
    monkeypatch.setattr(auto, "LIMIT_S", 100.0)
    assert not is_dense(mine(x), mine, x) and len(races) == 1
    (file,) = (tmp_path / "auto").iterdir()
    assert "slower" not in file.read_text()
    races.own = 1.0
    while len(races) < 2 and next(now) < 10:
        mine(x)
    assert is_dense(mine(x), mine, x)


def test_a_model_that_takes_seconds_runs_once_each_way(races, monkeypatch):
    monkeypatch.setattr(auto, "LIMIT_S", 0.0)  # any time is too long
    mine, passes = model(), []
    guard.set_backend(mine, "auto")
    forward = type(mine).forward
    monkeypatch.setattr(type(mine), "forward", lambda self, x: passes.append(self) or forward(self, x))
    mine(images(mine, 1))
    assert not races and len(passes) == 5  # two that decide, one each way, the user's


def test_hooks_of_the_user_see_one_call(races):
    mine, seen = model(), []
    guard.set_backend(mine, "auto")
    mine.blocks[1].register_forward_hook(lambda *_: seen.append("block"))
    mine.register_forward_pre_hook(lambda *_: seen.append("model"))
    mine(images(mine, 1))
    assert sorted(seen) == ["block", "model"] and races


def test_every_schedule_is_checked(races):
    config = SparsityConfig(
        keep=0.3, rank=4, cells=(2, 2), tokens=Tokens(keep=0.8, stages=(1,), importance="attention")
    )
    mine = graft.graft(build("deit", depth=2), config).requires_grad_(False)
    less = config.model_copy(update={"keep": 0.2})
    schedules.offer(mine, {0.7: config, 0.5: less}, 0.7)
    guard.set_backend(mine, "auto")
    for budget in (0.7, 0.5, 0.7):
        mine.set_budget(budget)
        mine(images(mine, 1))
    assert len(races) == 2


def test_nothing_is_checked_where_nothing_is_decided(races):
    mine = model()
    x = images(mine, 1)
    for backend, allowed in (("reference", True), ("auto", False)):
        guard.set_backend(mine, backend, dense_allowed=allowed)
        mine(x)
    guard.set_backend(mine, "auto")
    with sparse_form(mine):
        mine(x)
    torch.jit.trace(mine, x, check_trace=False)
    torch.export.export(mine, (x,))
    mine.train()(x)
    mine.eval()(x)  # weights may have changed
    assert not races


def test_all_dense_is_not_measured(races, monkeypatch):
    monkeypatch.setattr(auto, "decide", lambda ms, rounds: auto.Choice("sdpa", ms, rounds, "pretended"))
    mine = model()
    guard.set_backend(mine, "auto")
    x = images(mine, 1)
    assert is_dense(mine(x), mine, x) and not races


def test_copies_and_pickles_are_checked_for_themselves(races):
    mine = model()
    guard.set_backend(mine, "auto")
    guard.set_backend(mine, "auto")  # one hook
    assert len(mine._forward_pre_hooks) == 1
    x = images(mine, 1)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert is_dense(other(x), other, x)
    assert len(races) == 1  # the second one reads what the first wrote
