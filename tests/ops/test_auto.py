"""backend=auto: what is measured, decided, remembered and reported; and where dense attention may never stand in."""

import copy
import dataclasses
import itertools
import json
import math
import os
import pickle
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.op_calls import head_lowrank, head_ranking
from sparsify.config import SparsityConfig, TokenLowrank
from sparsify.errors import UsageError
from sparsify.nn import graft
from sparsify.nn.attention import Execution
from sparsify.nn.execution import set_execution, sparse_form
from sparsify.nn.predictor import HeadLowrankPredictor
from sparsify.ops import auto, backends, candidates, remembered
from sparsify.ops.attention import attention
from sparsify.ops.auto import Chooser
from sparsify.ops.cpu import build
from sparsify.ops.cpu import kernels as cpu
from sparsify.ops.selection import Context
from sparsify.ops.spec import Kind, Shape, Spec

SPEC = Spec.uniform(5, 1, "clusters", (4, 4), (2, 2))
SHAPE = Shape(1, 2, 17, 8, torch.float32, "cpu", 1, False, "input", "cpu", Kind("head-folded", 8, 4), SPEC)
SPARSE, DENSE = 7.0, 9.0  # what the pretended kernels return


class Clock:
    """Time that passes only when a candidate runs, by the milliseconds of its list, over and over."""

    def __init__(self, **ms: list[float]) -> None:
        self.now, self.ran, self.made = 0.0, [], 0
        self.ms = {name.replace("_", "-"): itertools.cycle(times) for name, times in ms.items()}

    def __call__(self) -> float:
        return self.now

    def make(self, shape: Shape, sparse=None):
        self.made += 1
        return {name: lambda name=name: self.run(name) for name in self.ms}

    def run(self, name: str) -> None:
        self.ran.append(name)
        self.now += next(self.ms[name]) / 1000

    def chooser(self) -> Chooser:
        return Chooser(self.make, self, self)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(
        build, "build", lambda: build.Built(tmp_path / "made-from" / "library.so")
    )  # none is built here
    return tmp_path / "auto"


@pytest.fixture
def kernels(monkeypatch):
    """Pretended kernels that fill their output with SPARSE or DENSE; a list of what was called."""
    called = []

    def attention(name, value):
        def run(q, *rest):
            called.append(name)
            B, H, N, d = q.shape
            return q.new_full((B, N, H * d), value)

        return run

    monkeypatch.setattr(cpu, "available", lambda: None, raising=False)
    monkeypatch.setattr(cpu, "isa", lambda: "avx512", raising=False)
    for name, value in (("attention", SPARSE), ("dense", DENSE)):
        monkeypatch.setattr(cpu, name, attention(name, value), raising=False)
    return called


def block(config: SparsityConfig | None = None) -> nn.Module:
    """A module whose output is that of its attention op: heads of 8, 17 tokens."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    host = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3).eval()
    config = config or SparsityConfig(keep=0.25, rank=4, cells=(2, 2))
    module = graft.graft(host, config).blocks[0].attn.requires_grad_(False)
    module.proj = nn.Identity()
    return module


class Always(Chooser):
    """A chooser that has decided for `path`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def choose(self, shape: Shape, sparse) -> auto.Choice:
        return auto.Choice(self.path, {self.path: 1.0}, 7, "always")


# ---- the race and the decision ----


@pytest.mark.parametrize(
    "ms,taken",
    [
        ({"cpu": [4], "dense_cpu": [3], "sdpa": [2]}, "sdpa"),
        ({"cpu": [2.05], "dense_cpu": [2.04], "sdpa": [2]}, "cpu"),  # within 3 %
        ({"cpu": [2.1], "dense_cpu": [2.05], "sdpa": [2]}, "dense-cpu"),
        ({"reference": [2.0], "sdpa": [2.05]}, "sdpa"),
        ({"cpu": [1, 90, 1], "sdpa": [2]}, "cpu"),  # the median, not the mean
        ({"sdpa": [2]}, "sdpa"),
    ],
)
def test_lowest_median_wins_and_the_preferred_of_equals(ms, taken, folder):
    choice = Clock(**ms).chooser().choose(SHAPE, None)
    assert choice.taken == taken and choice.taken in choice.ms and choice.reason


@pytest.mark.parametrize("seed", range(5))
def test_noise_within_the_margin_does_not_turn_the_decision_round(seed, folder):
    draw = torch.Generator().manual_seed(seed)
    noisy = [(2 + 0.04 * torch.rand(11, generator=draw)).tolist() for _ in range(3)]
    clock = Clock(cpu=noisy[0], dense_cpu=noisy[1], sdpa=noisy[2])
    assert clock.chooser().choose(SHAPE, None).taken == "cpu"


def test_candidates_take_turns():
    clock = Clock(cpu=[100], sdpa=[100])
    ms, rounds, _ = auto.race(clock.make(SHAPE), clock)
    assert clock.ran[:8] == ["cpu", "sdpa"] * 2 + ["cpu", "sdpa", "sdpa", "cpu"]  # two of each to warm up
    assert rounds == auto.MIN_ROUNDS and ms == pytest.approx({"cpu": 100, "sdpa": 100})


def test_a_candidate_that_is_twice_as_slow_leaves_the_race():
    clock = Clock(cpu=[1.0, 1.3], dense_cpu=[1.1], sdpa=[3])
    ms, rounds, _ = auto.race(clock.make(SHAPE), clock)
    assert clock.ran.count("sdpa") == 2 + auto.FIRST_ROUNDS and ms["sdpa"] == pytest.approx(3)
    assert rounds > 50 and clock.now < auto.BUDGET_S + 0.02  # the other two are close: all the time is spent
    clock = Clock(cpu=[1], sdpa=[3])
    assert auto.race(clock.make(SHAPE), clock)[1] == auto.FIRST_ROUNDS


def test_a_clear_race_ends_early_and_a_long_one_after_its_limit():
    clock = Clock(cpu=[1.0, 1.1], sdpa=[1.5, 1.6])
    assert auto.race(clock.make(SHAPE), clock)[1] == auto.SURE_ROUNDS
    clock = Clock(cpu=[1000], sdpa=[1500])
    assert auto.race(clock.make(SHAPE), clock)[1] == auto.FIRST_ROUNDS


# ---- memory ----


def test_a_decision_is_measured_once_and_remembered_on_disk(folder):
    clock = Clock(cpu=[2], sdpa=[1])
    chooser = clock.chooser()
    first = chooser.choose(SHAPE, None)
    assert chooser.choose(SHAPE, None) is first and clock.made == 1
    (file,) = folder.iterdir()
    content = json.loads(file.read_text())
    assert content["machine"]["torch"] == torch.__version__ and list(content["choices"]) == [SHAPE.text()]
    again = Clock(cpu=[1], sdpa=[2])
    assert again.chooser().choose(SHAPE, None) == first and again.made == 0


def test_a_decision_of_a_busy_processor_is_made_again_and_not_written(folder):
    clock, share = Clock(cpu=[2], sdpa=[1]), 0.5
    chooser = Chooser(clock.make, clock, lambda: share * clock.now)
    first = chooser.choose(SHAPE, None)
    assert first.taken == "sdpa" and first.busy and "the processor was busy" in first.reason
    assert not folder.exists() and chooser.choose(SHAPE, None) is first
    clock.ms["cpu"] = itertools.cycle([0.5])
    for number, wait in enumerate(auto.AGAIN_S, 2):  # still busy
        clock.now += wait - 0.1
        assert chooser.choose(SHAPE, None).busy and clock.made == number - 1
        clock.now += 0.2
        assert chooser.choose(SHAPE, None).taken == "cpu" and clock.made == number
    clock.now += 1e6
    assert chooser.choose(SHAPE, None).busy and clock.made == 1 + len(auto.AGAIN_S)  # enough


def test_once_the_processor_is_quiet_the_decision_stays(folder):
    clock, share = Clock(cpu=[2], sdpa=[1]), [0.5]
    chooser = Chooser(clock.make, clock, lambda: share[0] * clock.now)
    assert chooser.choose(SHAPE, None).busy
    share[0], clock.now = 1.0, clock.now + auto.AGAIN_S[0]
    again = chooser.choose(SHAPE, None)
    assert not again.busy and clock.made == 2 and len(list(folder.iterdir())) == 1
    clock.now += 1e6
    assert chooser.choose(SHAPE, None) is again


OTHER = {
    "batch": 2, "heads": 3, "tokens": 18, "head_dim": 16, "dtype": torch.bfloat16, "threads": 2, "masked": True,
    "merged": True, "placed": True, "graph": True,
    "precision": "bf16", "sparse": "reference",
}  # fmt: skip
OTHER_KIND = {
    "name": "head", "rank_sum": 7, "rank_max": 5, "channels": 3, "up_heads": 1, "coef_topk": 2, "coef_threshold": 0.05,
}  # fmt: skip
OTHER_SPEC = {"budgets": (6,), "prefix": 2, "tail": "mean", "grid": (2, 8), "cells": ((1, 2),), "tile": (2, 2)}


def test_every_field_of_the_shape_is_part_of_the_key(folder):
    assert set(OTHER) == set(Shape._fields) - {"device", "kind", "spec"}
    assert set(OTHER_KIND) == set(Kind._fields) and set(OTHER_SPEC) == set(Spec._fields) - {"scale"}  # of head_dim
    clock = Clock(cpu=[2], sdpa=[1], reference=[3])
    chooser = clock.chooser()
    shapes = [SHAPE, *(SHAPE._replace(**{name: value}) for name, value in OTHER.items())]
    shapes += [SHAPE._replace(kind=SHAPE.kind._replace(**{name: value})) for name, value in OTHER_KIND.items()]
    shapes += [SHAPE._replace(spec=SPEC._replace(**{name: value})) for name, value in OTHER_SPEC.items()]
    for shape in shapes:
        chooser.choose(shape, None)
    assert clock.made == len(shapes) == len({shape.text() for shape in shapes})
    assert Clock(cpu=[1], sdpa=[2]).chooser().choose(shapes[-1], None).taken == "sdpa"  # all of them are on disk


def written(choice: object) -> bytes:
    return json.dumps({"choices": {SHAPE.text(): choice}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b'{"choices": 3}', b"[" * 100_000,
        written(None), written({"taken": "cpu"}), written({"taken": "magic", "ms": {"magic": 1}, "rounds": 7, "reason": ""}),
        written({"taken": "reference", "ms": {"reference": 1}, "rounds": 7, "reason": "not of this shape's candidates"}),
        written({"taken": "cpu", "ms": {"cpu": "fast"}, "rounds": 7, "reason": ""}),
        written({"taken": "cpu", "ms": {"cpu": 1}, "rounds": "x", "reason": ""}),
        written({"taken": "cpu", "ms": {"cpu": 1}, "rounds": math.inf, "reason": ""}),
        written({"taken": "cpu", "ms": {"cpu": math.inf}, "rounds": 7, "reason": ""}),
        written({"taken": "cpu", "ms": {"cpu": math.nan}, "rounds": 7, "reason": ""}),
        written({"taken": "cpu", "ms": {"cpu": 1}, "rounds": 7, "reason": " " * 1_000_000}),  # too long to be ours
    ],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(content, folder):
    Clock(cpu=[1], sdpa=[2]).chooser().choose(SHAPE, None)
    (file,) = folder.iterdir()
    file.write_bytes(content)
    clock = Clock(cpu=[2], sdpa=[1])
    assert clock.chooser().choose(SHAPE, None).taken == "sdpa" and clock.made == 1
    assert json.loads(file.read_text())["choices"][SHAPE.text()]["taken"] == "sdpa"
    assert [file] == list(folder.iterdir())


def test_a_pipe_in_its_place_is_replaced_and_not_waited_for(folder):
    path = remembered.file_of(remembered.identity("cpu"))
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert Clock(cpu=[1], sdpa=[2]).chooser().choose(SHAPE, None).taken == "cpu"
    assert json.loads(path.read_text())["choices"][SHAPE.text()]["taken"] == "cpu"


@pytest.mark.parametrize("what", ["a file in its place", "a folder in its place", "no home"])
def test_a_cache_that_cannot_be_written_is_no_error(what, tmp_path, folder, monkeypatch):
    if what == "a file in its place":
        folder.write_text("mine")
    elif what == "a folder in its place":
        remembered.file_of(remembered.identity("cpu")).mkdir(parents=True)
    else:
        monkeypatch.delenv("SPARSIFY_CACHE")
        monkeypatch.setattr(remembered.build, "cache_dir", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    clock = Clock(cpu=[2], sdpa=[1])
    chooser = clock.chooser()
    assert chooser.choose(SHAPE, None).taken == chooser.choose(SHAPE, None).taken == "sdpa" and clock.made == 1
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_another_machine_or_version_measures_for_itself(folder, monkeypatch):
    Clock(cpu=[2], sdpa=[1]).chooser().choose(SHAPE, None)
    monkeypatch.setattr(remembered, "device_name", lambda device: "another processor")
    assert Clock(cpu=[1], sdpa=[2]).chooser().choose(SHAPE, None).taken == "cpu"
    assert len(list(folder.iterdir())) == 2


def test_what_another_process_wrote_meanwhile_stays(folder):
    one, two = Clock(cpu=[1], sdpa=[2]).chooser(), Clock(cpu=[1], sdpa=[2]).chooser()
    one.choose(SHAPE, None)
    two.choose(SHAPE._replace(batch=2), None)
    one.choose(SHAPE._replace(batch=3), None)
    (file,) = folder.iterdir()
    assert len(json.loads(file.read_text())["choices"]) == 3


def test_threads_measure_a_shape_once(folder):
    clock, start = Clock(cpu=[2], sdpa=[1]), threading.Barrier(8)
    chooser, found = clock.chooser(), []

    def ask():
        start.wait()
        found.append(chooser.choose(SHAPE, None))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.made == 1 and len(found) == 8 and all(choice is found[0] for choice in found)


# ---- the candidates ----


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig(keep=0.25, rank=4),
        SparsityConfig(keep=0.25, rank=((3, 5),), fold=False, tail="mean"),
        SparsityConfig(keep=0.25, rank=4, predictor="token-lowrank", granularity="tile", tile=(2, 2)),
        SparsityConfig(keep=0.25, rank=4, predictor="token-lowrank", token_lowrank=TokenLowrank(channels=4)),
    ],
)
def test_candidates_are_the_calls_that_the_module_would_make(config, masked):
    module = block(config)
    q = torch.empty(2, 2, 17, 8)
    shape = module.shape(q, q if masked else None, "reference", module.spec(17))
    runs = candidates.make(shape, partial(module._timed, spec=shape.spec, backend="reference"))
    assert list(runs) == ["reference", "sdpa"]
    assert all(run().shape == (2, 17, 16) for run in runs.values())


def sparse(q, k, v, context):
    """The sparse form as a module with a folded predictor computes it."""
    return attention(q, k, v, head_ranking(q, k, None, None, context.size, [4, 4], 0.3), context, SPEC, "cpu")


def test_with_kernels_both_of_them_are_candidates(kernels):
    runs = candidates.make(SHAPE, sparse)
    assert list(runs) == ["cpu", "dense-cpu", "sdpa"]
    assert (
        (runs["cpu"]() == SPARSE).all() and (runs["dense-cpu"]() == DENSE).all() and kernels == ["attention", "dense"]
    )


def test_the_inputs_lie_as_qkv_gives_them_and_measuring_leaves_the_random_numbers_alone(kernels, monkeypatch):
    seen = []
    monkeypatch.setattr(cpu, "attention", lambda q, k, v, *rest: seen.extend((q, k, v)))
    state = torch.get_rng_state()
    candidates.make(SHAPE._replace(dtype=torch.bfloat16), sparse)["cpu"]()
    assert torch.equal(torch.get_rng_state(), state)
    for i, t in enumerate(seen):
        assert t.shape == (1, 2, 17, 8) and t.stride()[1:] == (8, 48, 1) and t.dtype == torch.bfloat16
        assert t.storage_offset() == 16 * i


# ---- inside the attention ----


@torch.inference_mode()
def test_dense_attention_only_where_it_is_allowed(kernels, folder):
    module, x = block(), torch.randn(2, 17, 16)
    q, k, v = module.qkv_heads(x)
    host = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert (module(x) == SPARSE).all()
    module.execution = Execution(dense_fallback=True, choose=Always("sdpa"))
    torch.testing.assert_close(module(x), host)
    module.execution = Execution(dense_fallback=True, choose=Always("dense-cpu"))
    assert (module(x) == DENSE).all()
    module.execution = Execution(dense_fallback=True, choose=Always("cpu"))
    assert (module(x) == SPARSE).all()
    module.execution = Execution(dense_fallback=False, choose=Always("sdpa"))
    assert (module(x) == SPARSE).all()


@pytest.mark.parametrize("path", ["sdpa", "dense-cpu"])
def test_never_dense_in_training_nor_where_a_gradient_is_needed(path, kernels, folder):
    module, x = block(), torch.randn(2, 17, 16)
    with torch.no_grad():
        reference = module.requires_grad_(True).sparse(*module.qkv_heads(x), None, None, module.spec(17), "reference")
        module.execution = Execution(dense_fallback=True, choose=Always(path))
        assert (module.train()(x) == SPARSE).all()
    module.execution = Execution("reference", dense_fallback=True, choose=Always(path))
    out = module.eval()(x)
    torch.testing.assert_close(out, reference)  # and by the reference, whose gradient it is
    out.sum().backward()
    assert module.qkv.weight.grad is not None
    module.requires_grad_(False)
    torch.testing.assert_close(module(x.requires_grad_()), reference)


@pytest.mark.parametrize("predictor", ["head-lowrank", "token-lowrank"])
def test_only_a_predictor_that_learns_needs_the_reference(predictor, kernels):
    module = block(SparsityConfig(keep=0.25, rank=4, predictor=predictor, fold=False))
    x = torch.randn(2, 17, 16)
    assert (module(x) == SPARSE).all()  # nothing requires a gradient, although they are enabled
    module.predictor.requires_grad_(True)
    out = module(x)
    assert out.requires_grad and not (out == SPARSE).all()
    out.sum().backward()  # the choice of keys has no gradient: nothing flows, and nothing fails


def test_nothing_is_measured_while_compiling_exporting_or_tracing(kernels, folder):
    module, x = block(), torch.randn(2, 17, 16)
    clock = Clock(cpu=[2], sdpa=[1])
    module.execution = Execution(dense_fallback=True, choose=clock.chooser())
    with torch.no_grad():
        compiled = torch.compile(module, backend="eager", fullgraph=True)(x)
        exported = torch.export.export(module, (x,))
        traced = torch.jit.trace(module, (x,), check_trace=False)
        meta = copy.deepcopy(module).to("meta")(x.to("meta"))
        with Watch() as seen:
            watched = module(x)
    assert clock.made == 0 and meta.shape == x.shape
    for out in (compiled, traced(x), watched):
        assert (out == SPARSE).all()
    assert "sparsify.sparse_attention.default" in seen.ops
    assert not any("sparsify" in str(node.target) for node in exported.graph.nodes)  # runs without this package
    module.execution = Execution("reference")
    torch.testing.assert_close(exported.module()(x), module(x))


class Watch(TorchDispatchMode):
    """Sees every op."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_without_kernels_or_with_a_mask_the_reference_is_the_sparse_form(kernels, monkeypatch, folder):
    module, x = block(), torch.randn(2, 17, 16)
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    with torch.inference_mode():
        masked = module(x, attn_mask=mask)
        module.execution = Execution("reference")
        torch.testing.assert_close(module(x, attn_mask=mask), masked)
        reference = module(x)
        module.execution = Execution(dense_fallback=True, choose=Clock(reference=[2], sdpa=[1]).chooser())
        q, k, v = module.qkv_heads(x)
        dense = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        torch.testing.assert_close(module(x, attn_mask=mask), dense)
        torch.testing.assert_close(module(x, is_causal=True), dense)
        torch.testing.assert_close(module(x, attn_mask=torch.zeros(17, 17).masked_fill(~mask, -torch.inf)), dense)
        monkeypatch.setattr(cpu, "available", lambda: "no compiler")
        module.execution = Execution()
        torch.testing.assert_close(module(x), reference)
    assert not kernels


def test_kernels_take_float32_and_bfloat16_on_cpu(kernels):
    q = torch.randn(1, 2, 17, 8)
    for dtype, taken in (
        (torch.float32, True), (torch.bfloat16, True), (torch.float16, False), (torch.float64, False)
    ):  # fmt: skip
        kernels.clear()
        x = q.to(dtype)
        assert bool((sparse(x, x, x, Context()) == SPARSE).all()) is taken and bool(kernels) is taken
        out = head_lowrank(x, x, x, None, None, None, None, None, (4, 4), 0.3, SPEC, "cpu")
        assert bool((out == SPARSE).all()) is taken


def test_the_op_has_the_references_gradient_whatever_computed_it(kernels):
    q, k, v = (torch.randn(1, 2, 17, 8, requires_grad=True) for _ in range(3))
    arguments = (None, None, None, None, None, [4, 4], 0.3, SPEC)
    grads = []
    for backend in ("reference", "cpu"):
        out = head_lowrank(q, k, v, *arguments, backend)
        grads.append(torch.autograd.grad(out.sum(), (q, k, v)))
    assert kernels
    torch.testing.assert_close(*grads)


# ---- plain configuration ----


def test_execution_survives_copies_and_is_no_part_of_the_state_dict():
    module, chooser = block(), Chooser()
    names = list(module.state_dict())
    module.execution = Execution("cpu", "bf16", True, chooser)
    assert list(module.state_dict()) == names
    assert copy.deepcopy(module).execution == module.execution and copy.deepcopy(module).execution.choose is chooser
    other = pickle.loads(pickle.dumps(module)).execution
    assert isinstance(other.choose, Chooser) and dataclasses.replace(other, choose=chooser) == module.execution


def test_set_execution_refuses_what_cannot_be_done(kernels, monkeypatch):
    module = block()
    for execution, words in (
        (Execution("magic"), "auto, cpu, reference"),
        (Execution(precision="int4"), "input, bf16"),
    ):
        with pytest.raises(UsageError, match=words):
            set_execution(module, execution)
    set_execution(module, Execution("cpu"))
    monkeypatch.setattr(cpu, "available", lambda: "no compiler was found")
    with pytest.raises(UsageError, match=r"'cpu'.*no compiler was found.*'reference'"):
        set_execution(module, Execution("cpu"))
    monkeypatch.setattr(cpu, "available", lambda: None)
    with pytest.raises(UsageError, match="float16"):
        set_execution(module.half(), Execution("cpu"))
    assert module.execution == Execution("cpu")


def test_sparse_form_forbids_the_fallback_for_a_while(kernels, folder):
    module = block()
    own = Execution("auto", "bf16", True, Always("sdpa"))
    set_execution(module, own)
    with sparse_form(module):
        assert module.execution == Execution("auto", "bf16")
    with sparse_form(module, "reference", "input"):
        assert module.execution == Execution("reference", "input")
    with pytest.raises(UsageError), sparse_form(module, "magic"):
        pass
    assert module.execution is own


def test_words_for_people(kernels, monkeypatch):
    here, full, half = torch.device("cpu"), torch.float32, torch.float16
    assert backends.describe("auto", "input", here, full) == "cpu (avx512)"
    assert backends.describe("cpu", "bf16", here, full) == "cpu (avx512, q, k and v in bfloat16)"
    assert backends.describe("reference", "input", here, full) == "reference"
    assert "float16" in backends.describe("auto", "input", here, half)
    assert backends.note("auto", here, full) == backends.note("reference", here, half) == ""
    monkeypatch.setattr(cpu, "available", lambda: "no compiler")
    assert "no compiler" in backends.note("auto", here, full)
    assert backends.describe("auto", "input", here, full) == "reference (no compiler)"


def test_blocks_whose_mean_ranks_differ_by_little_share_a_decision():
    kinds = [
        HeadLowrankPredictor(64, ranks, True).kind() for ranks in ((16, 16, 20), (20, 12, 18), (20, 20, 20), (1, 1, 1))
    ]
    assert kinds[0] == kinds[1] == kinds[2] and kinds[0].rank_sum == 60
    assert kinds[3].rank_sum == 3  # never more than the largest rank in every head


def test_budgets_by_head_are_one_decision_for_about_the_same_means():
    """By hand: budgets of 2 to 9 have the mean 5, cells of 1 and 7 the mean 4."""
    by_head = SPEC._replace(budgets=(2, 8), cells=((1, 1), (7, 1)))
    assert by_head.typical(17) == SPEC._replace(cells=((1, 4),))
    assert SPEC._replace(budgets=(1, 9), cells=((2, 2), (1, 4))).typical(17) == by_head.typical(17)
    assert SPEC.typical(17) is SPEC
    assert SPEC._replace(budgets=(60, 63)).typical(640).budgets == (60,)  # to 1/64 of the tokens
