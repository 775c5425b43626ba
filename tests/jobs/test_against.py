"""`profile --against`: both models in each runtime, packages that are not there, names that are not known."""

import json
import subprocess
import sys

import pytest
import torch

import sparsify
from helpers.error_lines import the_error
from helpers.families import build, draw_importance, images
from sparsify.cli import completion
from sparsify.config import SparsityConfig, Tokens
from sparsify.errors import SparsifyError, UsageError
from sparsify.jobs import against, runtimes
from sparsify.measure import latency
from sparsify.measure.latency import Budget
from sparsify.nn import graft
from sparsify.processes import Compute

ONCE = Budget(rounds=1)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("against") / "model.safetensors"
    sparsify.convert("digits", keep=0.3, calib_images=8, output=path)
    return path


@pytest.fixture
def short(monkeypatch):
    """Three rounds, whatever the command asks for."""
    by_round = latency.by_round
    monkeypatch.setattr(latency, "by_round", lambda calls, **how: by_round(calls, **how | {"rounds": 3}))


@pytest.fixture
def small():
    """One block with sparse attention and fewer tokens, random weights."""
    model = build("deit", depth=1)
    config = SparsityConfig(keep=0.3, rank=8, cells=(2, 2), tokens=Tokens(keep=0.6, stages=(1,)))
    return draw_importance(graft.graft(model, config)).requires_grad_(False)


def test_the_command_shows_both_models_in_each_runtime(file, run, short):
    words = ("--against", "eager,onnxruntime", "--json", "a.json", "--markdown", "a.md", "--batch-size", 2)
    code, out, err = run("profile", file, *words)
    assert code == 0, err
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("eager", "onnxruntime"))}
    assert list(rows) == ["eager", "onnxruntime"] and all(line.count("x") >= 2 for line in rows.values())
    told = " ".join(out.split())
    assert told.rpartition("Converted is ")[2].endswith(" ms.") and "the best dense way, " in told
    assert "batch 2, 28x28" in told and "onnxruntime 1." in told and "left out" not in told
    saved, shown = json.loads(open("a.json").read()), open("a.md").read()
    assert list(saved["runtimes"]) == ["eager", "onnxruntime"] and saved["conditions"]["batch_size"] == 2
    assert all(pair[which]["median"] > 0 for pair in saved["runtimes"].values() for which in ("dense", "converted"))
    best = saved["best_dense"]
    assert saved["runtimes"][best]["dense"]["median"] == min(
        pair["dense"]["median"] for pair in saved["runtimes"].values()
    )
    assert "| eager |" in shown and f"{best} " in shown
    assert saved["conditions"]["versions"].keys() == {"onnxruntime"}


def test_quiet_prints_nothing(file, run, short):
    assert run("profile", file, "--against", "eager", "-q") == (0, "", "")


@pytest.mark.parametrize("name", [n for n in runtimes.RUNTIMES if n != "compile"])
def test_every_runtime_runs_both_models(name, small, tmp_path):
    x = images(small, 2)
    request, runtime = runtimes.Request(x, Compute(backend="reference"), False, tmp_path), runtimes.RUNTIMES[name]
    for which, model in (("dense", graft.dense_twin(small)), ("converted", small)):
        for form, each in runtime.forms(model, False).items():
            run = runtime.prepare(each, f"{which}-{form}", request)
            with torch.inference_mode():
                near = 0.2 if runtime.int8 else 1e-4
                torch.testing.assert_close(run(), each(x), atol=near, rtol=near)
    assert list(runtime.forms(small, False)) == ([""] if name == "eager" else ["dense", "sparse"])
    assert list(runtime.forms(small, True)) == [""]


def test_compile_freezes_the_weights_and_restores_the_setting(small, tmp_path, monkeypatch):
    from torch._inductor import config

    seen, compiler = [], torch.compile

    def compiled(model, **how):
        def record(graph, inputs):
            seen.append(config.freezing)
            return graph.forward

        return compiler(model, backend=record, **how)

    monkeypatch.setattr(torch, "compile", compiled)
    torch.compiler.reset()
    x = images(small, 2)
    run = runtimes.RUNTIMES["compile"].prepare(small, "converted", runtimes.Request(x, Compute(), False, tmp_path))
    with torch.inference_mode():
        torch.testing.assert_close(run(), small(x), atol=1e-4, rtol=1e-4)
    assert seen == [True] and not config.freezing


def test_a_file_with_a_changed_backbone_has_no_dense_times(small):
    figures = against.profile_against(small, ("eager",), backbone_changed=True, budget=ONCE)
    assert figures.pairs["eager"].dense is None and figures.best_dense is None
    assert figures.best_converted == "eager" and figures.pairs["eager"].best_dense is None


def test_the_original_that_is_given_is_the_dense_model(small):
    dense = graft.dense_twin(small)
    figures = sparsify.profile_against(small, "eager", dense=dense, backbone_changed=True, repeats=1)
    assert figures.pairs["eager"].dense is not None and figures.conditions["runs"] == 1
    with pytest.raises(UsageError, match="sparse attention"):
        sparsify.profile_against(small, "eager", dense=small)


# ---- what cannot run ----


def test_a_signal_is_handled_after_programs_of_openvino_are_gone(file):
    """Of two `Core`s, that which was made first must not go first: it takes the stack of signal handlers with it."""
    pytest.importorskip("openvino")
    script = f"""if True:
        import gc, os, signal, sparsify
        sparsify.profile_against({str(file)!r}, ("openvino",), repeats=1)
        gc.collect()
        signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
        os.kill(os.getpid(), signal.SIGUSR1)
    """
    ended = subprocess.run([sys.executable, "-X", "faulthandler", "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.endswith("handled\n"), ended


@pytest.fixture
def without_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it fails


@pytest.fixture
def two(monkeypatch):
    """`all` are two."""
    monkeypatch.setattr(against, "RUNTIMES", {name: runtimes.RUNTIMES[name] for name in ("eager", "onnxruntime")})


def test_a_missing_package_is_named_with_its_command(file, run, without_onnxruntime, two, short):
    code, _, err = run("profile", file, "--against", "eager,onnxruntime")
    said = "onnxruntime is not installed: pip install 'sparsify-vit[export]'"
    assert code == 1 and the_error(err) == f"error: {said}"
    code, out, err = run("profile", file, "--against", "all")
    assert code == 0 and f"onnxruntime is left out: {said}" in " ".join(out.split())
    assert "\nonnxruntime " not in out.partition("onnxruntime is left out")[0].rstrip()


def test_a_dtype_that_a_runtime_lacks(small, two):
    half = Compute(dtype="bfloat16")
    figures = against.profile_against(small, ("all",), compute=half, budget=ONCE)
    assert figures.left_out == {"onnxruntime": "onnxruntime computes float32 only, not bfloat16"}
    assert list(figures.pairs) == ["eager"] and figures.conditions["dtype"] == "bfloat16"
    with pytest.raises(SparsifyError, match="onnxruntime computes float32 only"):
        against.profile_against(small, ("eager", "onnxruntime"), compute=half, budget=ONCE)


def test_a_runtime_that_cannot_run_one_model_still_times_the_other(small, monkeypatch):
    class Dense(runtimes.Eager):
        def prepare(self, model, name, request):
            if name == "converted-":
                raise RuntimeError("no such operator")
            return super().prepare(model, name, request)

    monkeypatch.setattr(against, "RUNTIMES", {"eager": runtimes.Eager("eager"), "other": Dense("other")})
    figures = against.profile_against(small, ("all",), budget=ONCE)
    assert figures.left_out == {"other, converted,": "other cannot run the converted model: no such operator"}
    assert figures.pairs["other"].dense is not None and figures.pairs["other"].converted is None
    with pytest.raises(SparsifyError, match="other cannot run the converted model: no such operator"):
        against.profile_against(small, ("other",), budget=ONCE)


def test_dense_answers_that_differ_are_said(small, monkeypatch):
    class Wrong(runtimes.Eager):
        def prepare(self, model, name, request):
            run = super().prepare(model, name, request)
            return lambda: 2 * run()

    monkeypatch.setattr(against, "RUNTIMES", {"eager": runtimes.Eager("eager"), "other": Wrong("other")})
    figures = against.profile_against(small, ("all",), budget=ONCE)
    (note,) = figures.notes
    assert note == "dense in other answers otherwise than in eager float32, by 100%: do not trust its time"


def test_bad_names_and_options_that_do_not_go_together(file, run, small):
    code, _, err = run("profile", file, "--against", "eager,tensorrt")
    known = "eager, compile, onnxruntime, openvino, onnxruntime-int8, openvino-int8, all"
    assert code == 2 and the_error(err) == f"error: --against tensorrt: expected one of {known}"
    code, _, err = run("profile", file, "--against", "all", "--tree", "--count-as", "paper")
    assert code == 2 and the_error(err).endswith("leave --tree, --count-as out")
    with pytest.raises(UsageError, match="runtime tensorrt: expected one of eager"):
        sparsify.profile_against(small, ["tensorrt"])
    with pytest.raises(UsageError, match="repeats 0"):
        sparsify.profile_against(small, ["eager"], repeats=0)
    with pytest.raises(UsageError, match="dtype 'float8'"):
        sparsify.profile_against(small, ["eager"], dtype="float8")


def test_words_of_completion_are_the_runtimes():
    assert (*runtimes.RUNTIMES, against.ALL) == completion.AGAINST
