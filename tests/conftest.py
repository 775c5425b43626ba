"""Shared fixtures."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from helpers import small_runs
from sparsify.cli.app import main
from sparsify.fit.finetune.validation import ValidationScore, Validator
from sparsify.jobs.convert import Conversion
from sparsify.ops.cpu import build
from sparsify.ops.cpu import kernels as cpu

Command = Callable[..., tuple[object, str, str]]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, but for the compiled kernels, which are those of the user: built once for all."""
    kernels, folder = build.cache_dir() / "kernels", tmp_path_factory.mktemp("cache")
    with contextlib.suppress(OSError):
        kernels.mkdir(parents=True, exist_ok=True)
        (folder / "kernels").symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSIFY_CACHE", str(folder))
        cpu.available()  # built now, where it is not: no test meets the message or the wait
        yield folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real weights and photographs (`SPARSIFY_TEST_DATA`); tests that need it are skipped without it."""
    checkout = Path(__file__).resolve().parent.parent
    folder = (checkout / os.environ.get("SPARSIFY_TEST_DATA", "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real weights and photographs in {folder} (SPARSIFY_TEST_DATA)")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs a command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[object, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Judges say these one after the other (KL); the last again and again."""
    given: list[float] = []

    def judged(self: Validator, model: object) -> ValidationScore:
        return ValidationScore(given.pop(0) if len(given) > 1 else given[0], 50.0, None, 24)

    monkeypatch.setattr(Validator, "__call__", judged)
    return given


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """`small_runs.CHOSEN` from its first step to its last, whose weights are written."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValidationScore, "better_than", lambda self, other: True)
        return small_runs.convert(folder / "m.safetensors", small_runs.CHOSEN)


@pytest.fixture
def ctrl_c(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs a command line in an empty folder, sends Ctrl-C once it calibrates: (exit code, stderr)."""

    def call(*arguments: str) -> tuple[int, str]:
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background has it ignored
        how, pipe = [sys.executable, "-m", "sparsify", *arguments], subprocess.PIPE
        process = subprocess.Popen(how, cwd=tmp_path, preexec_fn=heard, stdout=pipe, stderr=pipe, text=True)
        assert process.stderr is not None and process.stderr.readline().startswith("calibrating")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        return process.returncode, err.strip()

    return call
