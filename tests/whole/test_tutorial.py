"""docs/tutorial.md is true: its commands and its Python run, in order, in one empty folder, and print what it shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import sparsify
from sparsify.cli.app import main

DOCS = Path(__file__).resolve().parents[2] / "docs"
FENCE = re.compile(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, the file that it is to be written to, its lines."""

    language: str
    title: str
    text: str


def blocks(page):
    return [Block(*found) for found in FENCE.findall((DOCS / page).read_text(encoding="utf-8"))]


def labels(text):
    """What stands at the start of each line, before its figures."""
    return [re.split(r"  +|  *[-+]?\d", line.strip())[0].strip() or line.split()[0] for line in text.splitlines()]


@pytest.fixture
def shell(tmp_path, monkeypatch, capfd):
    """Runs one line; `sparsify ...` in this process, which has torch already: what it printed on stdout."""
    command = tmp_path / "bin" / "sparsify"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sparsify "$@"\n')
    command.chmod(0o755)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{command.parent}:{Path('/usr/bin')}:{Path('/bin')}")
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))

    def call(line):
        capfd.readouterr()
        if "|" in line or not line.startswith("sparsify "):
            done = subprocess.run(["bash", "-eo", "pipefail", "-c", line], capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, (line, done.stderr)
            return done.stdout
        with pytest.raises(SystemExit) as caught:
            main(shlex.split(line)[1:])
        out, err = capfd.readouterr()
        assert caught.value.code == 0, (line, err)
        return out

    return call


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_every_block_of_the_tutorial_runs_and_prints_what_it_shows(shell):
    names, printed, shown = {"__name__": "tutorial"}, "", 0
    for block in blocks("tutorial.md"):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "sh":
            printed = "".join(shell(line) for line in block.text.splitlines())
        elif block.language == "python":
            exec(compile(block.text, "tutorial.md", "exec"), names)
        elif block.language == "text":
            starts = [line.strip() for line in printed.splitlines()]
            for label in labels(block.text):
                assert any(line.startswith(label) for line in starts), f"'{label}' is not in:\n{printed}"
                shown += 1
        else:
            assert block.language == "console"  # what only a reader can do: the installation
    assert shown >= 12
    assert {"model.safetensors", "fewer.recipe.yaml", "tuned.run", "quarter.safetensors", "names.txt"} <= {
        path.name for path in Path().iterdir()
    }
    assert "deit_small" in Path("names.txt").read_text().splitlines()


def test_the_check_sees_a_row_that_is_not_there():
    assert labels("MHSA (as executed)  39.74 M  11.87 M  -70.1 %\nwrote a.b, c") == [
        "MHSA (as executed)",
        "wrote a.b, c",
    ]
    assert labels("                      dense   sparse   change") == ["dense"]
    assert labels("top-1, %               99.66   99.50") == ["top-1, %"]


def test_links_between_pages_lead_somewhere():
    """The same as `make docs` says of pages, without mkdocs."""
    missing = []
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            if not link.startswith(("http:", "https:")) and not (page.parent / link).exists():
                missing.append(f"{page.name}: {link}")
    assert not missing


def test_the_site_builds_whole_and_asks_nothing_of_the_outside(tmp_path):
    pytest.importorskip("material", reason="the extra 'docs' is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra 'docs' is not installed")
    (tmp_path / "no" / "torch").mkdir(parents=True)
    (tmp_path / "no" / "torch" / "__init__.py").write_text("raise ImportError('pages are made without torch')")
    site = tmp_path / "site"
    how = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(tmp_path / "no")}
    done = subprocess.run(how, cwd=DOCS.parent, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="tutorial.html"' in home and "Results" in home and (site / "search" / "search_index.js").is_file()
    library = (site / "reference" / "library.html").read_text(encoding="utf-8")
    for name in sparsify.__all__:
        assert name.startswith("_") or f'id="sparsify.{name}"' in library, name
    assert "fraction of keys that each query attends to" in library  # of a docstring
    assert (
        library.count("<strong>Returns:</strong>") > 1 and "Example:" not in library
    )  # as docs/docstrings.py has them
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="?(https?:[^"\s>]+)', page.read_text(encoding="utf-8")
        )
        assert not fetched, (page.name, fetched)
