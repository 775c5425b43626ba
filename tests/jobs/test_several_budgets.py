"""One file, many speeds: `convert --target-macs A,B` writes one backbone with a schedule for each."""

import json

import pytest
import torch

import sparsify
from helpers.error_lines import the_error
from helpers.families import images
from helpers.small_runs import recipe
from sparsify import config
from sparsify.errors import BadFile, UsageError
from sparsify.fit.schedule import choose
from sparsify.images import datasets
from sparsify.images.trainset import builtin_calibration
from sparsify.measure.accuracy import kl_terms
from sparsify.models import checkpoint, header
from sparsify.nn import graft, schedules
from sparsify.nn.adaptive import margins
from sparsify.recipe import load_recipe

CALIBRATE = load_recipe("calibrate").override(calib_images=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("several") / "several.safetensors"
    return sparsify.convert("digits", recipe=CALIBRATE, target_macs=(0.8, 0.4), output=path)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "single.safetensors"
    return sparsify.convert("digits", recipe=CALIBRATE, target_macs=0.4, output=path)


@torch.inference_mode()
def test_a_budget_gives_the_logits_of_a_file_made_for_it_alone(made, single):
    one = sparsify.load(single.path, backend="reference")
    chosen = sparsify.load(made.path, budget=0.4, backend="reference")
    first = sparsify.load(made.path, backend="reference")
    x = images(one)
    assert torch.equal(chosen(x), one(x)) and not torch.equal(first(x), one(x))
    first.set_budget(0.4)
    assert torch.equal(first(x), one(x))
    first.set_budget(1.0)
    dense = sparsify.load(single.path, budget=1.0, backend="reference")
    assert torch.equal(first(x), dense(x))
    assert made.path.stat().st_size < 1.02 * single.path.stat().st_size
    assert single.recipe is not None and made.recipe is None


def test_header_and_reports_have_all_budgets(made, single):
    found = checkpoint.read_header(made.path)
    assert list(found.schedules) == [0.8, 0.4] and found.budget == 0.8
    assert found.at(0.4).config == checkpoint.read_header(single.path).config
    for budget in (0.8, 0.4):
        report = found.at(budget).report
        assert report["macs_sparse"] / report["macs_dense"] == pytest.approx(budget, rel=0.02)
        assert report["macs_sparse"] == sparsify.profile(made.path, budget=budget, measure=False).macs_sparse
    assert found.at(1.0).report["macs_sparse"] == found.report["macs_dense"]
    written = json.loads(made.report_json.read_text())
    assert (
        list(written["budgets"]) == ["0.8", "0.4"]
        and written["macs_sparse"] == written["budgets"]["0.8"]["macs_sparse"]
    )
    assert "| 0.8 (in use) |" in made.report_md.read_text()


def test_saved_again_it_keeps_its_budgets(made, tmp_path):
    model = sparsify.load(made.path, img_size=42, backend="reference")
    model.set_budget(0.4)
    again = sparsify.save(model, tmp_path / "again.safetensors", like=made.path)
    found = checkpoint.read_header(again)
    assert found.budget == 0.4 and list(found.schedules) == [0.8, 0.4]
    assert found.report["macs_sparse"] > checkpoint.read_header(made.path).at(0.4).report["macs_sparse"]
    with torch.inference_mode():
        for budget in (0.8, 0.4):
            model.set_budget(budget)
            x = images(model)
            assert torch.equal(sparsify.load(again, budget=budget, backend="reference")(x), model(x))


@torch.inference_mode()
def test_adaptive_runs_the_two_schedules_of_its_rule(made, run):
    model = sparsify.load(made.path, adaptive=0.7, backend="reference")
    rule, x = model.rule, images(model.first, batch=8)
    assert rule == checkpoint.read_header(made.path).rule(0.7) and rule.first in (0.8, 0.4) and rule.cost <= 0.7
    one, two = (sparsify.load(made.path, budget=b, backend="reference") for b in (rule.first, rule.second))
    again = margins(one(x)) < rule.margin
    torch.testing.assert_close(model(x), torch.where(again[:, None], two(x), one(x)), rtol=1e-5, atol=1e-5)
    evaluated = sparsify.evaluate(model, "digits")
    assert 0 < evaluated.ran_twice < 60 and evaluated.agreement > 90
    code, out, err = run("eval", made.path, "--data", "digits", "--adaptive", 0.7)
    assert code == 0 and f"{evaluated.ran_twice:.1f} % ran twice" in out and "adaptive: budget 0.4" in err
    figures = sparsify.profile_adaptive(model)
    assert figures.mean(figures.macs) == pytest.approx(rule.cost * figures.macs["dense"], rel=0.02)
    assert figures.worst(figures.medians) > figures.mean(figures.medians) > 0
    code, out, _ = run(
        "profile", made.path, "--adaptive", 0.7, "--no-measure", "--json", "a.json", "--markdown", "a.md"
    )
    assert code == 0 and "worst" in out and json.loads(open("a.json").read())["rule"]["first"] == rule.first
    assert "| MACs |" in open("a.md").read()
    code, _, err = run("profile", made.path, "--adaptive", 0.7, "--tree")
    assert code == 2 and "leave --tree and --count-as out" in the_error(err)


def test_results_are_of_one_schedule(made, run):
    assert run("eval", made.path, "--data", "digits", "--budget", 0.4, "--results-file", "r.json")[0] == 0
    assert json.loads(open("r.json").read())["conditions"]["budget"] == 0.4
    assert run("report", made.path, "--budget", 0.4, "--eval", "r.json", "-o", "r.html")[0] == 0
    page = open("r.html").read()
    assert "0.4 of the dense model" in page and "the file also has 0.8" in page
    code, _, err = run("report", made.path, "--eval", "r.json")
    assert code == 1 and "results of budget 0.4, this is about budget 0.8" in the_error(err)
    code, _, err = run("push", made.path, "me/model", "--dry-run", "--eval", "r.json")
    assert code == 1 and "results of budget 0.4" in the_error(err)
    assert run("eval", made.path, "--data", "digits", "--adaptive", 0.7, "--results-file", "a.json")[0] == 0
    code, _, err = run("report", made.path, "--eval", "a.json")
    assert code == 1 and "adaptive inference" in the_error(err)
    code, out, _ = run("push", made.path, "me/model", "--dry-run")
    assert code == 0 and "| 0.8 (in use) |" in out


def test_keeps_to_choose_from_are_given_in_python_too(tmp_path):
    made = sparsify.convert(
        "digits", recipe=CALIBRATE, keep="dense", target_macs=0.6, output=tmp_path / "m.safetensors"
    )
    assert set(made.header.config.keep) == {"dense"} and made.header.config.tokens is not None


def test_for_a_runtime_tokens_alone_are_spent_in_fewer_rounds(run, tmp_path, monkeypatch):
    for words, message in (
        (["--for", "openvino"], "runtime openvino: fewer tokens are what pays there; give --target-macs"),
        (["--for", "openvino", "--target-latency", 0.6], "as times are measured in eager mode"),
        (["--for", "tensorrt"], "runtime tensorrt: expected one of eager, compile, onnxruntime, openvino"),
    ):
        code, _, err = run("convert", "digits", *words)
        assert code == 2 and message in the_error(err)
    given, for_macs = [], choose.for_macs
    monkeypatch.setattr(choose, "for_macs", lambda *of: given.append(of[-1]) or for_macs(*of))
    made = sparsify.convert(
        "digits", recipe=CALIBRATE, runtime="openvino", target_macs=0.6, output=tmp_path / "m.safetensors"
    )
    assert set(made.header.config.keep) == {"dense"} and made.header.config.tokens is not None
    assert given == [config.RUNTIMES["openvino"]["overhead"]] and config.target(0.6, None).overhead == 0


def test_distance_of_the_calibration_images_counts_other_answers(made):
    found = checkpoint.read_header(made.path)
    model = checkpoint.load(made.path)
    x = next(iter(builtin_calibration(True, 4, 0, datasets.transform(datasets.data_config(model)))))
    with torch.inference_mode():
        dense, sparse = graft.dense_twin(model)(x), model(x)
    expected = kl_terms(dense, sparse).sum(-1) + (dense.argmax(1) != sparse.argmax(1))
    torch.testing.assert_close(torch.tensor(found.sureness[0.8].distances), expected, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(found.sureness[0.8].margins), margins(sparse), rtol=2e-3, atol=1e-4)


def test_more_images_tell_how_sure_a_schedule_is_than_calibrate(made, tmp_path):
    own = sparsify.convert(
        "digits", recipe=CALIBRATE, data="digits", target_macs=0.6, output=tmp_path / "own.safetensors"
    )
    assert len(own.header.sureness[0.6].margins) == 4 * CALIBRATE.calib_images
    assert len(checkpoint.read_header(made.path).sureness[0.8].margins) == CALIBRATE.calib_images  # built-in pictures


def test_two_programs_with_the_rule_in_their_metadata(made, tmp_path):
    first, second = sparsify.export_pair(made.path, 0.7, "pt2", tmp_path / "m.pt2")
    assert [each.path.name for each in (first, second)] == ["m.first.pt2", "m.second.pt2"]
    rule = checkpoint.read_header(made.path).rule(0.7)
    for each, budget in ((first, rule.first), (second, rule.second)):
        files = {"sparsify.budget": "", "sparsify.adaptive": ""}
        torch.export.load(each.path, extra_files=files)
        assert files["sparsify.budget"] == f"{budget:g}" and json.loads(files["sparsify.adaptive"]) == rule._asdict()


def test_what_cannot_be_adaptive_is_refused_by_name(made, tmp_path):
    plain = sparsify.convert("digits", recipe=CALIBRATE.override(spread="none"), output=tmp_path / "plain.safetensors")
    told = checkpoint.read_header(made.path)
    features = told._replace(sureness={}, architecture=told.architecture | {"model_args": {"num_classes": 0}})
    adaptive = sparsify.load(made.path, adaptive=0.6)
    for use, message in (
        (lambda: sparsify.load(plain.path, adaptive=0.6), "has no margins of calibration images"),
        (lambda: features.rule(0.6), "gives features"),
        (lambda: sparsify.load(made.path, adaptive=0.1), "from 0.4 to 1"),
        (lambda: sparsify.load(made.path, adaptive=0.6, budget=0.4), "either budget"),
        (lambda: sparsify.profile(adaptive), "profile_adaptive"),
        (
            lambda: sparsify.save(adaptive, tmp_path / "x.safetensors", like=made.path),
            "two schedules",
        ),
        (lambda: sparsify.export_pair(plain.path, 0.6, "pt2"), "has no margins"),
    ):
        with pytest.raises(UsageError, match=message):
            use()


def test_weights_that_changed_are_sure_of_other_images(made, tmp_path):
    model = sparsify.load(made.path)
    same = sparsify.save(model, tmp_path / "same.safetensors", like=made.path)
    assert checkpoint.read_header(same).sureness == checkpoint.read_header(made.path).sureness != {}
    with torch.no_grad():
        model.head.bias += 1.0
    other = sparsify.save(model, tmp_path / "other.safetensors", like=made.path)
    assert not checkpoint.read_header(other).sureness


def test_an_exported_program_has_the_budget_in_its_metadata(made, tmp_path):
    torch_program = sparsify.export(made.path, "pt2", tmp_path / "m.pt2", budget=0.4)
    files: dict[str, str] = {"sparsify.budget": ""}
    torch.export.load(torch_program.path, extra_files=files)
    assert files["sparsify.budget"] == "0.4"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(target_macs=(0.8, 0.4), recipe=recipe({}), data="digits"), "trained for one target"),
        (dict(target_macs=(0.8, 1.4)), "at most 1"),
        (dict(target_macs=()), "target_macs: .*at least 1"),
        (dict(target_latency=(0.8, "x")), "target_latency: expected a number"),
    ],
)
def test_targets_that_cannot_be_are_refused(arguments, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        sparsify.convert("digits", output=tmp_path / "m.safetensors", **arguments)
    assert not list(tmp_path.glob("m*"))


def test_a_budget_that_is_not_there_is_refused_by_name(made, tmp_path):
    for budget, use in ((0.5, sparsify.load), (0.5, lambda path, budget: sparsify.profile(path, budget=budget))):
        with pytest.raises(UsageError, match="has schedules for 0.8, 0.4"):
            use(made.path, budget=budget)
    plain = sparsify.convert("digits", recipe=CALIBRATE.override(spread="none"), output=tmp_path / "plain.safetensors")
    with pytest.raises(UsageError, match="has one schedule, chosen for no budget"):
        sparsify.load(plain.path, budget=0.5)
    assert not hasattr(sparsify.load(plain.path), "set_budget")
    assert sparsify.profile(plain.path, budget=1, measure=False).macs_sparse == plain.profile.macs_dense


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree: {"0.4": tree["0.4"]}, "expected of each schedule"),
        (lambda tree: tree | {"0.4": {"margins": [], "distances": []}}, "sureness 0.4 margins"),
        (lambda tree: tree | {"0.4": tree["0.4"] | {"margins": [0.5]}}, "of the same images"),
        (lambda tree: tree | {"0.4": tree["0.4"] | {"margins": [1.5] * 4}}, "at most 1"),
    ],
)
def test_sureness_of_a_file_is_checked(change, message, made):
    with checkpoint.reading(made.path) as file:
        meta = dict(file.metadata)
    meta["sparsify.sureness"] = json.dumps(change(json.loads(meta["sparsify.sureness"])))
    with pytest.raises(UsageError, match=message):
        header.parse(meta)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree: {"2": tree["0.4"]}, "a budget above 0 and up to 1"),
        (lambda tree: {"0.40": tree["0.4"]}, "a budget above 0 and up to 1"),
        (lambda tree: {"0.4": 7}, "a budget above 0 and up to 1"),
        (lambda tree: {"0.4": tree["0.4"]}, "config is none of them"),
        (lambda tree: tree | {"0.4": tree["0.4"] | {"report": {"macs_sparse": "many"}}}, "macs_sparse"),
        (lambda tree: tree | {"0.4": tree["0.4"] | {"config": {"tail": "mean"}}}, "differ in keep"),
        (lambda tree: tree | {f"0.{i}1": tree["0.4"] for i in range(1, 17)}, "more than 16"),
    ],
)
def test_schedules_of_a_file_are_checked(change, message, made):
    with checkpoint.reading(made.path) as file:
        meta = dict(file.metadata)
    meta["sparsify.schedules"] = json.dumps(change(json.loads(meta["sparsify.schedules"])))
    with pytest.raises(UsageError, match=message):
        header.parse(meta)


def test_a_schedule_that_needs_what_the_file_lacks_is_refused(made, tmp_path):
    found = checkpoint.read_header(made.path)
    model = schedules.applied(checkpoint.load(made.path), found.config)  # the predictors and importances of one alone
    path = tmp_path / "lacks.safetensors"
    checkpoint.save(model, path, found)
    with pytest.raises(BadFile, match="is missing"):
        checkpoint.load(path)
