"""Profiles: documented keys, the module tree, interleaved timing, memory, and what is said about them."""

import dataclasses
import doctest
import io
import itertools
import json
import os
import re
import sys

import pytest
import torch
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import sparsify
from helpers.families import build
from sparsify.cli import tables
from sparsify.cli.app import main
from sparsify.config import SparsityConfig, TokenLowrank, Tokens
from sparsify.errors import BadFile, SparsifyError, UsageError
from sparsify.files.outputs import write_json, write_text
from sparsify.measure import latency
from sparsify.measure.figures import Profile
from sparsify.measure.latency import Budget, Timing
from sparsify.measure.profile import profile
from sparsify.nn import graft
from sparsify.ops import auto, backends, remembered
from sparsify.processes import Compute
from sparsify.reports import accuracy
from sparsify.reports import profile as report
from sparsify.reports.words import human

THEORETICAL = set(
    """
    macs_dense macs_sparse mhsa_macs_dense mhsa_macs_sparse kept_macs prefix_macs predictor_macs tail_macs
    full_macs stage_macs tokens param_count param_count_dense unsupported backend conditions modules
    """.split()
)
MEASURED = set(
    """
    latency_ms_dense latency_ms_dense_p10 latency_ms_dense_p90 latency_ms_sparse latency_ms_sparse_p10
    latency_ms_sparse_p90 latency_ms_auto latency_ms_auto_p10 latency_ms_auto_p90 throughput_dense
    throughput_sparse throughput_auto speedup_sparse peak_memory_dense peak_memory_sparse choices
    """.split()
)


def small(config: SparsityConfig | None = None, **options) -> nn.Module:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5} | options
    return graft.graft(VisionTransformer(**options).eval(), config or SparsityConfig(keep=0.25, rank=4, cells=(2, 2)))


@pytest.fixture(scope="module")
def found() -> Profile:
    return profile(small(), compute=Compute(batch_size=3), budget=Budget(rounds=3))


def timed(p: Profile, dense: tuple[float, float, float], sparse: tuple[float, float, float]) -> Profile:
    """`p` with other times: median, p10, p90 in ms."""
    d, s = Timing(*dense, 9), Timing(*sparse, 9)
    return dataclasses.replace(p, measured=dataclasses.replace(p.measured, dense=d, sparse=s, auto=s))


def shown(*what: object) -> str:
    console = Console(file=io.StringIO(), width=80)
    for each in what:
        console.print(each)
    return console.file.getvalue()


# ---- keys ----


def test_documented_keys(found):
    tree = found.as_dict()
    assert set(tree) == THEORETICAL | MEASURED
    for key in set(tree) - {"modules"}:
        name = key.replace("_p10", "_...").replace("_p90", "_...")
        plain = (key, name, "latency_ms_...", "latency_ms_{dense,sparse,auto}_p10")
        assert any(each in Profile.__doc__ for each in plain), key
    assert json.loads(json.dumps(tree)) == tree


def test_the_docstring_has_the_figures_that_it_prints():
    assert doctest.testmod(sys.modules[profile.__module__]) == (0, 6)


def test_figures_fit_together(found):
    tree = found.as_dict()
    parts = ("kept_macs", "prefix_macs", "predictor_macs", "tail_macs", "full_macs")
    assert tree["mhsa_macs_sparse"] == sum(tree[part] for part in parts)
    assert tree["throughput_sparse"] == pytest.approx(3000 / tree["latency_ms_sparse"])
    assert tree["speedup_sparse"] == pytest.approx(tree["latency_ms_dense"] / tree["latency_ms_sparse"])
    assert tree["throughput_auto"] == pytest.approx(3000 / tree["latency_ms_auto"])
    assert tree["latency_ms_sparse_p10"] <= tree["latency_ms_sparse"] <= tree["latency_ms_sparse_p90"]
    assert tree["backend"] == backends.describe("auto", "input", torch.device("cpu"), torch.float32)
    conditions = tree["conditions"]
    assert (conditions["runs"], conditions["batch_size"], conditions["img_size"]) == (3, 3, [32, 32])
    assert {"threads", "device", "device_name", "dtype", "torch", "timm", "sparsify"} <= set(conditions)


def test_macs_are_per_image_whatever_the_batch(found):
    assert profile(small(), measure=False).macs_sparse == found.macs_sparse


def test_nothing_measured_leaves_the_keys_out():
    assert set(profile(small(), measure=False).as_dict()) == THEORETICAL


def test_predictor_parameters_are_counted():
    # a_q and a_k of 3 blocks: [2, 16, 4] each
    found = profile(small(SparsityConfig(keep=0.25, rank=4, fold=False)), measure=False)
    assert found.param_count - found.param_count_dense == 3 * 2 * (2 * 16 * 4)


# ---- tree ----


def test_tree_parents_hold_their_children(found):
    rows = {row["name"]: row for row in found.as_dict()["modules"]}
    assert rows[""]["macs_sparse"] == found.macs_sparse
    assert rows[""]["macs_dense"] == found.macs_dense
    for name, row in rows.items():
        assert row["depth"] == (name.count(".") + 1 if name else 0)
        children = [r for n, r in rows.items() if n and n.rpartition(".")[0] == name]
        if not children:
            continue
        own = {kind: row[f"macs_{kind}"] - sum(c[f"macs_{kind}"] for c in children) for kind in ("dense", "sparse")}
        if name.endswith(".attn"):  # what the attention op does beside the predictor
            assert own["dense"] == row["mhsa_macs_dense"]
            assert own["sparse"] == row["mhsa_macs_sparse"] - row["predictor_macs"]
        else:
            assert own == {"dense": 0, "sparse": 0}


@pytest.mark.parametrize("fold", [True, False])
def test_tree_shows_a_predictor_in_every_block(fold):
    found = profile(small(SparsityConfig(keep=0.25, rank=4, fold=fold)), measure=False)
    rows = [row for row in found.modules if row["name"].endswith(".predictor")]
    assert [row["name"] for row in rows] == [f"blocks.{i}.attn.predictor" for i in range(3)]
    assert sum(row["macs_sparse"] for row in rows) == found.predictor_macs > 0
    assert report.to_markdown(found).count("predictor | HeadLowrank") == 3


def test_tree_on_screen_joins_blocks_that_are_alike():
    alike = profile(small(), measure=False)
    assert shown(tables.module_tree(alike)).count("predictor") == 1
    assert "0-2: 3 alike" in shown(tables.module_tree(alike))
    assert shown(tables.module_tree(alike, full=True)).count("predictor") == 3
    differ = profile(small(SparsityConfig(keep=(0.5, 0.5, 0.1), rank=4)), measure=False)
    assert shown(tables.module_tree(differ)).count("predictor") == 2


# ---- the model is left alone ----


def test_profile_changes_nothing():
    model = small().train()
    before = {name: (t.data_ptr(), t.dtype) for name, t in model.state_dict().items()}
    assert profile(model, compute=Compute(dtype="bfloat16"), budget=Budget(rounds=1)).conditions["dtype"] == "bfloat16"
    assert {name: (t.data_ptr(), t.dtype) for name, t in model.state_dict().items()} == before
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "int8.*float32"),
        ({"batch_size": 0}, "batch size 0"),
        ({"repeats": 0}, "repeats 0"),
        ({"backend": "magic"}, "magic.*reference"),
        ({"backend": "cpu", "dtype": "float16"}, "cpu.*float16.*reference"),
        ({"kernel_precision": "int4"}, "int4.*bf16"),
        ({"count_as": "both"}, "both.*product, paper"),
        ({"device": "warp"}, "warp"),
        ({"img_size": 40}, "40x40.*32x32"),
    ],
)
def test_bad_options_are_usage_errors(options, message):
    with pytest.raises(UsageError, match=message):
        sparsify.profile(small(), **options)


@pytest.mark.parametrize(
    "options, rounds",
    [({"repeats": 2}, 2), ({"budget_s": 0.0}, latency.MIN_ROUNDS), ({"budget_s": 9.0, "repeats": 2}, 2)],
)
def test_how_long_is_measured_is_said_in_rounds_or_in_seconds(options, rounds):
    assert sparsify.profile(small(), **options).conditions["runs"] == rounds


def test_dense_model_is_refused():
    with pytest.raises(SparsifyError, match="no sparse attention"):
        profile(graft.dense_twin(small()))


def test_dynamic_image_size_and_token_lowrank():
    model = small(dynamic_img_size=True)
    assert profile(model, img_size=(32, 32), measure=False).macs_sparse == profile(model, measure=False).macs_sparse
    token = SparsityConfig(predictor="token-lowrank", rank=4, token_lowrank=TokenLowrank(channels=4))
    assert profile(small(token), measure=False).predictor_macs > 0


# ---- timing ----


class Clock:
    """Time that passes only when a candidate runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def candidate(self, name: str, seconds: list[float]):
        durations = itertools.cycle(seconds)

        def run() -> None:
            self.ran.append(name)
            self.now += next(durations)

        return run

    def __call__(self) -> float:
        return self.now


def test_candidates_take_turns_in_alternating_order():
    clock = Clock()
    candidates = {name: clock.candidate(name, [1.0]) for name in "abc"}
    found = latency.interleaved(candidates, rounds=3, warmup=1, clock=clock)
    assert "".join(clock.ran) == "abc" + "abc" + "cba" + "abc"
    assert {t.runs for t in found.values()} == {3}


def test_median_and_spread_are_of_the_timed_runs():
    clock = Clock()
    candidates = {"a": clock.candidate("a", [0.001, 0.002, 0.009]), "b": clock.candidate("b", [0.004])}
    found = latency.interleaved(candidates, rounds=3, warmup=3, clock=clock)
    assert found["a"].median == pytest.approx(2)
    assert found["a"].p10 == pytest.approx(1.2)  # a fifth of the way from 1 to 2
    assert found["a"].p90 == pytest.approx(7.6)  # four fifths of the way from 2 to 9
    assert found["b"] == Timing(pytest.approx(4), pytest.approx(4), pytest.approx(4), 3)
    assert found["b"].throughput(8) == pytest.approx(2000)


@pytest.mark.parametrize(("seconds", "rounds"), [(100.0, latency.MIN_ROUNDS), (0.5, 10)])
def test_time_budget_with_at_least_five_rounds(seconds, rounds):
    clock = Clock()
    found = latency.interleaved({"a": clock.candidate("a", [seconds])}, budget_s=5, warmup=0, clock=clock)
    assert found["a"].runs == rounds


def test_timing_runs_without_gradients():
    seen = []
    latency.interleaved({"a": lambda: seen.append(torch.is_inference_mode_enabled())}, rounds=1)
    assert all(seen)


# ---- memory ----


def test_peak_memory_by_hand(capfd):
    # weight 500 x 1000 and bias 500; input 400 x 1000; at the peak two outputs of 400 x 500 live, 4 bytes each
    model = nn.Sequential(nn.Linear(1000, 500), nn.ReLU())
    found = latency.peak_memory(model, torch.zeros(400, 1000))
    expected = 4 * (500 * 1000 + 500 + 400 * 1000 + 2 * 400 * 500)
    assert expected <= found <= 1.02 * expected
    assert capfd.readouterr().err == ""


def test_peak_memory_sees_inside_the_op():
    model = small(img_size=128)  # N = 257: the reference writes all scores, 2 heads of 257 x 257
    found = profile(model, compute=Compute(backend="reference"), budget=Budget(rounds=1)).measured
    assert found.peak_memory_sparse - found.peak_memory_dense > 4 * 2 * 257 * 257


# ---- what auto takes ----


def fake_race(monkeypatch, **ms: float) -> None:
    """Every decision is made from these times, whatever the machine; no kernels."""
    monkeypatch.setattr(auto, "race", lambda runs, *rest: auto.Race({name: ms[name] for name in runs}, 9, 1.0))
    monkeypatch.setattr(backends, "not_built", lambda: "no compiler")
    monkeypatch.setattr(remembered, "read", lambda path: {})
    monkeypatch.setattr(remembered, "add", lambda *arguments: None)


def test_auto_takes_dense_attention_where_it_is_faster_and_says_so(monkeypatch):
    fake_race(monkeypatch, reference=0.42, sdpa=0.31)
    found = profile(
        small(SparsityConfig(keep=(0.25, 0.5, 0.25), rank=4, cells=(2, 2))),
        budget=Budget(rounds=9),
        compute=Compute(batch_size=2),
    )
    assert found.backend == "reference (no compiler)"
    assert [choice["blocks"] for choice in found.choices] == [[0, 2], [1]]
    first = found.as_dict()["choices"][0]
    assert first["taken"] == "sdpa" and first["ms"] == {"reference": 0.42, "sdpa": 0.31} and first["reason"]
    assert first["shape"]["batch"] == 2 and first["shape"]["tokens"] == 17 and first["shape"]["sparse"] == "reference"
    assert found.measured.auto.median < found.measured.sparse.median  # the reference is the slower one by far
    line = "auto: blocks 0-2 torch's dense SDPA (0.31 ms; sparse reference 0.42)"
    assert line in report.auto(found) and line in report.to_markdown(found)
    assert line in " ".join(shown(tables.profile_table(found)).split())


@pytest.mark.parametrize("changed", [False, True])
def test_no_dense_fallback_where_the_backbone_was_changed(changed, monkeypatch):
    fake_race(monkeypatch, reference=0.42, sdpa=0.31)
    found = profile(small(), budget=Budget(rounds=1), backbone_changed=changed)
    assert [choice["taken"] for choice in found.choices] == ["reference" if changed else "sdpa"]
    if changed:
        assert found.choices[0]["ms"] == {}
        assert report.auto(found)[1] == "auto: blocks 0-2 sparse reference (no dense fallback for this model)"


def test_dense_blocks_and_blocks_of_prefix_rows_alone_are_no_choice(monkeypatch):
    fake_race(monkeypatch, reference=0.42, sdpa=0.31)
    tokens = Tokens(way="merge", keep=(0.5, 1.0, 0.0))
    model = small(SparsityConfig(keep=("dense", 0.5, 0.5), rank=4, cells=(2, 2), tokens=tokens))
    found = profile(model, budget=Budget(rounds=1))
    assert [(choice["blocks"], choice["taken"]) for choice in found.choices] == [
        ([0], "sdpa"),
        ([1], "sdpa"),
        ([2], "sdpa"),
    ]
    dense, chosen, prefix = found.choices
    assert dense["shape"]["tokens"] == 17 and "dense" in dense["reason"] and dense["ms"] == prefix["ms"] == {}
    assert chosen["shape"]["tokens"] == 9 and chosen["shape"]["merged"] and chosen["shape"]["placed"]
    assert "prefix rows" in prefix["reason"] and len(report.auto(found)) == 4
    assert found.measured.sparse.median > 0 and "attend" not in vars(model.blocks[0].attn)


def test_blocks_that_differ_have_lines_of_their_own(found):
    def choice(blocks, taken, sparse, sdpa):
        return {"blocks": blocks, "shape": {}, "taken": taken, "ms": {"cpu": sparse, "sdpa": sdpa}, "reason": ""}

    p = dataclasses.replace(
        found, choices=(choice([0, 3], "cpu", 1, 2), choice([1, 2, 5], "sdpa", 3, 2), choice([4], "sdpa", 7, 2))
    )
    assert report.auto(p)[1:] == [
        "auto: blocks 0, 3 sparse kernels (1 ms; torch's dense SDPA 2)",
        "auto: blocks 1-2, 4-5 torch's dense SDPA (2 ms; sparse kernels 4)",
    ]


# ---- words ----


@pytest.mark.parametrize(
    ("dense", "sparse", "words"),
    [
        ((10, 9, 11), (23, 22, 24), "Sparse is 2.3x slower than dense here"),
        ((23, 22, 24), (10, 9, 11), "Sparse is 2.3x faster than dense here."),
        ((100, 99, 101), (105, 104, 106), "Sparse is 5 % slower than dense here"),
        ((10, 8, 12), (11, 9, 13), "equally fast here, within the spread"),
    ],
)
def test_verdict_in_words(found, dense, sparse, words):
    p = timed(found, dense, sparse)
    assert words in report.verdict(p)
    assert words in " ".join(shown(tables.profile_table(p)).split())
    assert words in report.to_markdown(p)


def test_table_at_80_columns_without_colour(found):
    text = shown(tables.profile_table(found), tables.module_tree(found, full=True))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    assert "…" not in text
    for word in (
        "Theoretical",
        "Measured",
        "MHSA",
        "kept pairs",
        "prefix rows",
        "predictor",
        "tail",
        "p10-p90",
        "batch 3",
    ):
        assert word in text


def test_nothing_measured_says_so():
    p = profile(small(), measure=False)
    assert "Measured" not in shown(tables.profile_table(p))
    assert "latency" not in report.to_markdown(p)
    assert report.verdict(p) == "" and report.auto(p) == []


@pytest.mark.parametrize("count_as", ["product", "paper"])
def test_without_a_dense_model_a_dash_stands_for_every_dense_figure_and_change(count_as, monkeypatch):
    fake_race(monkeypatch, reference=0.42, sdpa=0.31)
    p = profile(small(), budget=Budget(rounds=1), backbone_changed=True, count_as=count_as)
    with_dense = dataclasses.replace(profile(small(), budget=Budget(rounds=1), count_as=count_as), stage_macs=7)
    p = dataclasses.replace(p, stage_macs=7)
    for rows in (report.headline, report.measured):
        assert [(row[0], row[1], row[3]) for row in rows(p)] == [(row[0], "–", "–") for row in rows(with_dense)]
    assert [row[2] for row in report.headline(p)] == [row[2] for row in report.headline(with_dense)]
    assert report.remarks(p) == report.remarks(with_dense)
    assert report.verdict(p) == report.NO_DENSE and "dense" not in report.auto(p)[0]
    assert report.auto(p)[0].endswith(f"{p.measured.auto.p10:.4g}-{p.measured.auto.p90:.4g})")
    for text in (shown(tables.profile_table(p), tables.module_tree(p)), report.to_markdown(p)):
        assert text.count("No dense figures") == 1 and "%" not in text and "than dense" not in text
    bare = dataclasses.replace(p, measured=None, choices=())
    for text in (shown(tables.profile_table(bare)), report.to_markdown(bare)):
        assert text.count("No dense figures") == 1
    assert with_dense.dense == (with_dense.macs_dense, with_dense.mhsa_macs_dense)
    with pytest.raises(SparsifyError, match="no dense figures"):
        _ = p.dense


def test_markdown_and_the_screen_have_the_same_rows(found):
    screen, text = " ".join(shown(tables.profile_table(found)).split()), report.to_markdown(found)
    plain = re.sub(" +", " ", text)
    for row in (*report.headline(found), *report.measured(found)):
        assert re.sub(" +", " ", f"| {' | '.join(row)} |") in plain and " ".join(" ".join(row).split()) in screen
    assert "| HeadLowrank |" in text and " | – | " in text.split("## By module")[1]


def test_uncounted_ops_are_said_loudly(found):
    p = dataclasses.replace(found, unsupported={"aten::fft": 2})
    assert "NOT COUNTED" in shown(tables.profile_table(p))
    assert "NOT COUNTED" in report.to_markdown(p)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (12, "12"),
        (999, "999"),
        (1000, "1.000 k"),
        (357_663_744, "357.7 M"),
        (4_608_338_304, "4.608 G"),
        (99_999_999, "100.0 M"),
        (999_999_999, "1.000 G"),
    ],
)
def test_human_numbers(number, text):
    assert human(number) == text


def test_eval_table():
    result = {"top1": 71.0, "dense_top1": 71.5, "top5": None, "dense_top5": None, "agreement": 94.25, "kl": 0.0191}
    result |= {"images": 950, "images_lost": 20, "images_gained": 15, "broken": 2, "cosine_pooled": None}
    text = shown(tables.eval_table(result | {"throughput_dense": 60.0, "throughput_sparse": 30.0}))
    assert "-0.50 points" in text
    assert "-50.0 %" in text
    for word in ("94.25", "0.0191", "950", "20", "15", "2 broken"):
        assert word in text
    assert "top-5" not in text
    assert "cosine" not in text


def test_eval_table_of_features():
    text = shown(
        tables.eval_table({"cosine_pooled": 0.99, "rel_error_patch": 0.1, "knn_top1": 80.0, "dense_knn_top1": 81.0})
    )
    assert "k-nearest-neighbour" in text
    assert "0.9900" in text
    assert "agreement" not in text


def test_command_counts_as_the_authors_do(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    for line in (
        ["convert", "digits", "--calib-images", "8", "-o", path, "--quiet"],
        ["profile", path, "--no-measure", "--count-as", "paper", "--json", tmp_path / "p.json"],
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in line])
        assert caught.value.code == 0
    assert "authors' accounting" in capsys.readouterr().out
    figures = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert figures["paper"]["mhsa_macs_dense"] == figures["mhsa_macs_dense"]


# ---- files ----


def test_json_has_exact_numbers(found, tmp_path):
    write_json(tmp_path / "p.json", found.as_dict())
    assert json.loads((tmp_path / "p.json").read_text(encoding="utf-8")) == found.as_dict()


def test_results_file_has_timms_columns(tmp_path):
    accuracy.write_results(tmp_path / "r.csv", {"model": "a", "top1": 71.5, "top5": None, "kl": 0.02})
    header, row = (tmp_path / "r.csv").read_text(encoding="utf-8").splitlines()
    assert header == "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation,kl"
    assert row == "a,71.5,28.5,,,,,,,0.02"


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    write_text(path, "old")

    def full_disk(handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(BadFile, match="No space"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_papers_predictor_with_sparse_coefficients_is_counted_on_meta_tensors():
    config = SparsityConfig(predictor="token-lowrank", rank=12, keep=0.3)  # 8 of 12 coefficients
    model = graft.graft(build("deit", depth=1), config)
    n, N, H, d = 36, 37, 3, 64
    assert profile(model, measure=False).predictor_macs == H * (N * d * 12 + n * d * 12 + n * N * 8)
