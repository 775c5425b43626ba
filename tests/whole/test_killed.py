"""Signals: Ctrl-C and SIGTERM end a run between two steps, and SIGKILL costs at most what was not saved."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from helpers import small_runs
from helpers.small_runs import CHOSEN, recipe
from sparsify.fit.finetune import saved_state
from sparsify.fit.finetune.loop import Interrupts
from sparsify.recipe import recipe_yaml

# signals


def test_signals_are_a_wish_until_the_second_ctrl_c():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert not interrupts.requested
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert interrupts.requested
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    found = []

    def elsewhere():
        with Interrupts() as there:
            found.append((there.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=elsewhere)
    thread.start(), thread.join()
    assert found == [(False, before[0])]


LATEST = (
    "import sys; from sparsify.fit.finetune.validation import ValidationScore as S; S.better_than = lambda a, b: True; "
)
COMMAND = LATEST + "from sparsify.cli.app import main; main(sys.argv[1:])"


def launched(folder, *more):
    how = ["convert", "digits", "--data", "digits", "--recipe", "own.yaml", "-o", "m.safetensors", *map(str, more)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *how],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(folder, process, rows):
    path = folder / "m.run" / "metrics.csv"
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if path.exists() and path.read_text().count("\n") > rows:
            return
        time.sleep(0.005)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("asked", [signal.SIGTERM])
def test_the_command_ends_with_130_and_one_line(tmp_path, asked):
    (tmp_path / "own.yaml").write_text(recipe_yaml(recipe({"steps": 5000})))
    process = launched(tmp_path, "--quiet")
    wait_for_rows(tmp_path, process, 2)
    process.send_signal(asked)
    out, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if "Warning" not in line and not line.startswith("  ")]
    assert process.returncode == 130 and not out and len(lines) == 1
    assert lines[0].startswith("error: interrupted after ") and "--resume" in lines[0]
    assert (
        saved_state.load(tmp_path / "m.run" / "state.safetensors").facts["done"]
        == len(small_runs.metrics(tmp_path / "m.run"))
        >= 2
    )


def test_a_killed_run_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    (tmp_path / "own.yaml").write_text(recipe_yaml(CHOSEN))
    drawn = random.Random(5)
    for rows in sorted(drawn.sample(range(6), 3)):
        process = launched(tmp_path, "--save-minutes", 0, "--resume")
        wait_for_rows(tmp_path, process, rows)
        time.sleep(drawn.uniform(0, 0.1))
        process.kill()
        process.communicate()
        if (tmp_path / "m.safetensors").exists():  # it was done before
            break
    out, err = launched(tmp_path, "--resume").communicate(timeout=120)
    assert "wrote m.safetensors" in out, err
    found, expected = small_runs.tensors(tmp_path / "m.safetensors"), small_runs.tensors(undisturbed.path)
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())
    assert small_runs.metrics(tmp_path / "m.run") == small_runs.metrics(undisturbed.run)
    assert not [path.name for path in (tmp_path / "m.run").iterdir() if path.name.startswith(".")]
