"""What a run of fine-tuning writes while it runs: CSV files, TensorBoard, the picture, the bar and its lines."""

import io
import math
import random
import sys
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sparsify import progress
from sparsify.cli import terminal
from sparsify.cli.progress import Reporter
from sparsify.errors import BadFile
from sparsify.fit.finetune.log import LOSSES, METRICS, TrainingLog, read
from sparsify.fit.finetune.loop import training_note
from sparsify.recipe import Losses
from sparsify.reports import training_plot


def row(step, stage=0, **more):
    return {"step": step, "stage": stage, "epoch": step / 7, "lr": 1e-3 / 3, "loss": math.pi / step, **more}


def score(step, weights="current", stage=0, **more):
    return {"step": step, "stage": stage, "epoch": step / 7, "weights": weights, "images": 10, "best": 0} | more


def events(folder):
    """Scalars as TensorBoard shows them: {tag: [(step, value)]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    seen.Reload()
    return {tag: [(e.step, e.value) for e in seen.Scalars(tag)] for tag in seen.Tags()["scalars"]}


def test_numbers_come_back_to_the_bit_and_absent_parts_are_empty(tmp_path):
    draw = random.Random(0)
    values = [draw.random() * 10 ** draw.randint(-30, 30) for _ in range(50)] + [math.inf, 0.1 + 0.2, 5e-324]
    with TrainingLog(tmp_path / "run", ["a"], None) as made:
        for i, value in enumerate(values, 1):
            made.write_step(row(i, logits=value, loss=np.float32(value) if value < 1e30 else value))
    text = (tmp_path / "run" / "metrics.csv").read_text()
    assert (
        text.splitlines()[0]
        == "step,stage,epoch,lr,loss,classification,logits,tokens,features,attention,mass,basis_l1,images_per_s"
    )
    found = read(tmp_path / "run" / "metrics.csv")
    assert [r["logits"] for r in found] == values and found[6]["epoch"] == 1.0
    assert found[0]["tokens"] is None and type(found[0]["step"]) is int and "np." not in text


def test_a_row_is_there_for_another_reader_at_once(tmp_path):
    made = TrainingLog(tmp_path, ["a"], None)
    made.write_step(row(1))
    assert [r["step"] for r in read(tmp_path / "metrics.csv")] == [1]
    made.flush()
    made.close()
    made.close()


def test_every_loss_of_a_stage_has_a_column():
    weights = {name for name, field in Losses.model_fields.items() if field.default == 0.0}
    assert weights == set(LOSSES)


def test_an_unknown_name_is_refused(tmp_path):
    with TrainingLog(tmp_path, ["a"], None) as made:
        with pytest.raises(ValueError, match="colour"):
            made.write_step(row(1, colour=1.0))
        with pytest.raises(ValueError, match="colour"):
            made.write_validation(score(1, colour=1.0))


def test_a_resumed_run_has_the_rows_of_one_that_was_never_stopped(tmp_path):
    def go(folder, first, last, resume):
        with TrainingLog(folder, ["a", "b"], resume) as made:
            if resume is None:
                made.write_validation(score(0, "start", agreement=50.0))
            for i in range(first, last + 1):
                made.write_step(row(i, stage=int(i > 4), logits=1 / i))
                if i % 3 == 0:
                    made.write_validation(score(i, agreement=50 + i / 3, kl=0.1 / i))

    go(tmp_path / "whole", 1, 10, None)
    go(tmp_path / "cut", 1, 7, None)  # the last state that was saved is of step 5
    with open(tmp_path / "cut" / "metrics.csv", "a") as file:
        file.write("8,1,1.14")  # killed while it wrote
    go(tmp_path / "cut", 6, 10, 5)
    for name in ("metrics.csv", "validation.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert events(tmp_path / "cut") == events(tmp_path / "whole")
    assert [step for step, _ in events(tmp_path / "cut")["loss/logits"]] == list(range(1, 11))


def test_a_validation_that_is_done_again_replaces_the_first(tmp_path):
    with TrainingLog(tmp_path, ["a"], None) as made:
        made.write_step(row(1))
        made.write_validation(score(1, agreement=60.0))
        made.write_validation(score(1, "ema", agreement=61.0))
    with TrainingLog(tmp_path, ["a"], 1) as made:
        made.write_validation(score(1, agreement=60.0, best=1))
    found = read(tmp_path / "validation.csv")
    assert sorted((r["weights"], r["best"]) for r in found) == [("current", 1), ("ema", 0)]
    assert {"validation/agreement", "validation/agreement_ema"} <= events(tmp_path).keys()


def test_a_new_run_takes_the_place_of_an_older_one(tmp_path):
    for n in (5, 2):
        with TrainingLog(tmp_path, ["a"], None) as made:
            for i in range(1, n + 1):
                made.write_step(row(i))
    assert len(read(tmp_path / "metrics.csv")) == 2 == len(events(tmp_path)["loss/total"])


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", ",".join(METRICS) + "\n1,2\n", ",".join(METRICS) + "\nx" + "," * (len(METRICS) - 1) + "\n"]
)
def test_a_foreign_file_is_not_overwritten_by_a_resumed_run(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(BadFile, match=r"metrics.csv.*move it away"):
        TrainingLog(tmp_path, ["a"], 3)
    assert (tmp_path / "metrics.csv").read_text() == text


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFile, match="cannot write") as caught:
        TrainingLog(tmp_path / "file", ["a"], None)
    assert "\n" not in str(caught.value)


def test_no_file_has_no_rows(tmp_path):
    assert read(tmp_path / "validation.csv") == []


@pytest.mark.parametrize("how", ["missing", "breaks later"])
def test_without_tensorboard_the_rest_is_written_and_one_line_says_so(how, tmp_path, monkeypatch):
    said = []
    if how == "missing":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with TrainingLog(tmp_path, ["a"], None, said.append) as made:
        if how == "breaks later":
            monkeypatch.setattr(made.board, "add_scalar", lambda *a: 1 / 0)
        for i in (1, 2, 3):
            made.write_step(row(i))
        made.write_validation(score(3, agreement=1.0))
        made.flush()
    assert len(said) == 1 and "TensorBoard" in said[0] and "\n" not in said[0]
    assert len(read(tmp_path / "metrics.csv")) == 3 and (tmp_path / "curve.png").is_file()


def test_a_picture_that_fails_costs_a_line(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(training_plot, "draw", lambda *a: 1 / 0)
    with TrainingLog(tmp_path, ["a"], None, said.append) as made:
        made.write_step(row(1))
    assert said == ["could not draw the plot (division by zero)"]


RUNS = {  # stages with their steps, validations
    "two stages": ([("a", 30), ("b", 60)], True),
    "one step": ([("a", 1)], True),
    "no validation": ([("a", 12)], False),
    "many steps": ([("a", 5000)], False),
    "narrow stages": ([(f"$a stage_{i}", n) for i, n in enumerate((1, 500, 1))], True),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_picture_is_drawn_of_every_run(kind, tmp_path, recwarn):
    stages, validated = RUNS[kind]
    said, step = [], 0
    with TrainingLog(tmp_path, [name for name, _ in stages], None, said.append) as made:
        made.board = None
        if validated:
            made.write_validation(score(0, "start", agreement=70.0, kl=0.5, top1=60.0))
        for stage, (_, n) in enumerate(stages):
            for i in range(n):
                step += 1
                made.write_step(row(step, stage, loss=math.nan if i % 10 == 9 else 100.0**-stage))
            if validated:
                made.write_validation(score(step, stage=stage, agreement=80.0, kl=0.001, best=1))
                made.write_validation(score(step, "ema", stage, agreement=81.0, kl=0.001))
    assert not said and not [w for w in recwarn if "matplotlib" in str(w.filename)]
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width == 1800 and picture.height > 700


def test_only_the_start_is_drawn_too_and_nothing_is_no_picture(tmp_path):
    with TrainingLog(tmp_path, ["a"], None):
        pass
    assert not (tmp_path / "curve.png").exists()
    with TrainingLog(tmp_path, ["a"], None) as made:
        made.write_validation(score(0, "start", agreement=70.0))
    assert (tmp_path / "curve.png").is_file()


def test_a_thinned_line_keeps_its_peaks_and_the_mean_a_straight_line():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[[7, 50_001]] = 5, -5
    few, kept = training_plot.thinned(x, y)
    assert len(few) < 2 * training_plot.POINTS and (kept.max(), kept.min()) == (5, -5) and (np.diff(few) > 0).all()
    assert np.allclose(training_plot.running_mean(x[:100], 9)[4:-4], x[4:96])
    assert training_plot.running_mean(np.array([2.0]), 5).tolist() == [2.0]


# the bar


@pytest.fixture
def ticks(monkeypatch):
    """The reporter's clock: a list whose only element is the time."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_away_from_a_terminal_training_has_a_line_every_30_s_and_at_the_end_of_a_stage(capsys, ticks, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with Reporter() as reporter:
        for stage in ("predictors 1/2", "distill 2/2"):
            for i in range(1, 101):
                ticks[0] += 1
                reporter.update(stage, i, 100, training_note(0.1342, 1.9e-4, 11.32))
            reporter.update(stage, 100, 100, training_note(0.1342, 1.9e-4, 11.32))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and "\x1b" not in err
    assert [line.split("  ")[0] for line in lines[:4]] == [f"predictors 1/2: {n}/100" for n in (31, 61, 91, 100)]
    assert lines[0] == "predictors 1/2: 31/100  loss 0.134  lr 1.9e-04  11.3 images/s  1:09 left"
    assert lines[-1] == "distill 2/2: 100/100  loss 0.134  lr 1.9e-04  11.3 images/s" and len(lines) == 8


def test_other_steps_have_a_line_every_10_s_and_a_repeated_one_starts_anew(capsys, ticks):
    with Reporter() as reporter:
        for _ in range(2):
            for done in range(0, 31, 5):
                reporter.update("validation", done, None if done == 30 else 30)
                ticks[0] += 5
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["validation: 10/30 images", "validation: 20/30 images", "validation: 30 images"] * 2


def test_quiet_shows_nothing(capsys, ticks):
    with Reporter(quiet=True) as reporter:
        for i in range(3):
            ticks[0] += 100
            reporter.update("distill", i, 2, "loss 1")
    assert capsys.readouterr() == ("", "")


def test_at_a_terminal_a_bar_of_training_fits_80_columns(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    console = Console(file=screen, force_terminal=True, no_color=True, width=80, legacy_windows=False)
    monkeypatch.setattr(terminal, "console", lambda **how: console)
    monkeypatch.setenv("TERM", "xterm")
    with Reporter() as reporter:
        for i in range(110, 121):
            reporter.update("distill [2/3]", i, 350, training_note(0.1342, 1.9e-4, 11.32))
            time.sleep(0.02)
        reporter.update("validation", 5, 10)
        reporter.update("validation", 10, 10)
        reporter.update("validation", 2, 10)  # the next one
        shown = reporter.bar.make_tasks_table(reporter.bar.tasks)
        assert reporter.bar.tasks[1].completed == 2 and not reporter.bar.tasks[1].finished
    with console.capture() as seen:
        console.print(shown)
    first = seen.get().splitlines()[0]
    assert first.startswith("distill [2/3]") and "120/350 loss 0.134  lr 1.9e-04  11.3 images/s" in first
    assert first.rstrip().endswith(" left") and len(first) <= 80 and "…" not in first


def test_a_clock_has_hours_only_where_there_are_some():
    assert [progress.clock(s) for s in (0, 3.2, 252, 3600, 3843.5)] == ["0:00", "0:04", "4:12", "1:00:00", "1:04:04"]
