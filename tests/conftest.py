"""Shared fixtures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparsify.cli import main
from sparsify.ops import cpu
from sparsify.ops.cpu import build

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
