"""Every code block of README, CONTRIBUTING and the guides is true.

Python runs, in order, one page in one folder, with small stand-ins for models and data (`helpers/pages.py`). Commands are
parsed as `sparsify` parses them: names, options and the form of their values. YAML is validated as a recipe or a part of
one. `text` blocks are output, formulas and drawings. The tutorial is run whole, commands too, by `test_tutorial.py`.
"""

from __future__ import annotations

import csv
import io
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from PIL import Image

import sparsify
from helpers import pages
from helpers.pages import Block, blocks
from sparsify.config import validate
from sparsify.errors import UsageError
from sparsify.recipe import Recipe, Stage

PAGES = [page for page in pages.pages() if page != "docs/tutorial.md" and blocks(page)]
NOT_RUN = {
    ("docs/gpu.md", "import sparsify"),  # needs a GPU
    # (page, its first line): why it does not run
}
CHEAP = ("--version", "models", "predict", "recipes", "show")
"""Commands that run as well: they take a second with the stand-ins."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield pages.Bench(folder)


@pytest.fixture
def place(bench, tmp_path, monkeypatch):
    """A fresh folder that has what the bench has, where blocks may write."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)

    def provide(text):
        bench.provide(text)
        for path in bench.folder.iterdir():
            if not (tmp_path / path.name).exists():
                (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)

    yield provide
    torch.set_num_threads(threads)


def code(page, *languages):
    return [b for b in blocks(page) if b.language in languages and (page, b.text.splitlines()[0]) not in NOT_RUN]


@pytest.mark.parametrize("page", [page for page in PAGES if code(page, "python")])
def test_python_of_a_page_runs(page, place, capsys):
    names = {"__name__": "page"}
    place("".join(block.text for block in code(page, "python")))
    for block in code(page, "python"):
        text = pages.Bench.fitted(block.text)
        try:
            if block.title:
                Path(block.title).write_text(text, encoding="utf-8")
                runpy.run_path(block.title)
            else:
                exec(compile("\n" * block.line + text, str(pages.ROOT / page), "exec"), names)
        except Exception as error:
            raise AssertionError(f"{block}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("page", [page for page in PAGES if code(page, "sh", "console")])
def test_commands_of_a_page_exist_as_they_are_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in code(page, "sh", "console"):
        for words in pages.commands(block):
            try:
                pages.check_command(words)
            except Exception as error:
                raise AssertionError(f"{block}: {' '.join(words)}: {error}") from error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("page", [page for page in PAGES if code(page, "yaml")])
def test_yaml_of_a_page_is_a_recipe_or_a_part_of_one(page):
    for block in code(page, "yaml"):
        tree = yaml.safe_load(block.text)
        if tree.keys() <= Recipe.model_fields.keys():
            validate(Recipe, tree, str(block))
        else:
            validate(Stage, {"steps": 1, "train": "all", **tree}, str(block))


def test_every_block_says_what_it_is():
    known = ("python", "sh", "console", "yaml", "text")
    unknown = [str(block) for page in PAGES for block in blocks(page) if block.language not in known]
    assert not unknown, f"give these a language, or `text`: {', '.join(unknown)}"


def test_nothing_is_left_out_that_is_not_there():
    assert not NOT_RUN - {(page, block.text.splitlines()[0]) for page in PAGES for block in blocks(page)}


def shell(block):
    return pages.commands(block) if block.language in ("sh", "console") else ()


LINES = sorted(
    {
        " ".join(words[1:])
        for page in PAGES
        for block in blocks(page)
        for words in shell(block)
        if words[0] == "sparsify" and words[1] in CHEAP
    }
)


@pytest.mark.parametrize("line", LINES)
def test_cheap_commands_run(line, place, run):
    place(line)
    code, _, err = run(*pages.Bench.fitted(line).split())
    assert code == 0, err


WRONG = {
    "an option": ("sh", "sparsify convert digits --keeps 0.1"),
    "a value": ("sh", "sparsify convert digits --calib-images many"),
    "a command": ("sh", "sparsify conv digits"),
    "a missing argument": ("sh", "sparsify convert --keep 0.1"),
    "behind a pipe": ("sh", "cut -f1 names | sparsify evaluate"),
    "under accelerate": ("console", "$ accelerate launch -m sparsify convert digits --kep 0.1"),
    "a target": ("sh", "make all-things"),
    "an extra": ("sh", "pip install 'sparsify-vit[everything]'"),
    "another program": ("sh", "sparsity convert digits"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_the_check_sees(kind):
    language, text = WRONG[kind]
    with pytest.raises((AssertionError, typer.TyperException)):
        for words in pages.commands(Block("page.md", 1, language, "", text)):
            pages.check_command(words)


def test_the_check_sees_a_wrong_recipe_and_knows_languages():
    with pytest.raises(UsageError):
        validate(Stage, {"steps": 1, "losses": {"logit": 1.0}}, "page")
    assert pages.guess("import sparsify\n") == "python" and pages.guess("sparsify models\n") == "sh"
    assert pages.guess("S_i = the b keys with the highest score\n") == ""
    console = Block("page.md", 1, "console", "", "$ sparsify models \\\n  --help  # all\nprinted\n")
    assert list(pages.commands(console)) == [["sparsify", "models", "--help"]]


# ---- docs/deployment.md ----


@pytest.fixture
def served(place):
    """A folder with a model and the programs of the page."""
    place("")
    for block in blocks("docs/deployment.md"):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
    return Path()


def test_the_server_answers_images_and_refuses_the_rest(served):
    client_of = pytest.importorskip("fastapi.testclient", reason="fastapi and httpx are not installed")
    app = runpy.run_path("server.py")["app"]
    file = io.BytesIO()
    Image.effect_noise((300, 200), 60).convert("RGB").save(file, "PNG")
    with client_of.TestClient(app) as client:
        answer = client.post("/classify", content=file.getvalue())
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert len(found) == 3 and found[0]["probability"] >= found[1]["probability"] > 0
        assert client.post("/classify", content=b"no image").status_code == 400
        assert client.post("/classify", content=bytes(11 << 20)).status_code == 413
        assert client.post("/classify", content=file.getvalue()[:500]).status_code == 400


def test_the_batch_job_writes_a_class_for_each_image(served, monkeypatch):
    shutil.copytree(served / "photos" / "0", served / "folder")
    for i in range(4, 9):  # nine: the last batch has one
        shutil.copy(served / "folder" / "0.jpg", served / "folder" / f"{i}.jpg")
    monkeypatch.chdir(served)
    monkeypatch.setattr(sys, "argv", ["batch.py", "folder"])
    runpy.run_path("batch.py", run_name="__main__")
    rows = list(csv.reader((served / "classes.csv").open()))
    assert [name for name, _ in rows] == [f"{i}.jpg" for i in range(9)]
    assert rows[0][1] == rows[4][1] and all(0 <= int(label) < 1000 for _, label in rows)


# ---- pages that are written by docs/reference.py ----


def test_the_reference_is_as_the_docstrings_say():
    written = runpy.run_path(str(pages.ROOT / "docs" / "reference.py"))["pages"]()
    stale = [name for name, text in written.items() if (pages.ROOT / "docs/reference" / name).read_text() != text]
    assert not stale, "run make reference"


def test_every_field_of_recipes_and_headers_has_a_meaning():
    for name in ("recipes.md", "header.md"):
        rows = [
            line for line in (pages.ROOT / "docs/reference" / name).read_text().splitlines() if line.startswith("| `")
        ]
        assert len(rows) > 30 or name == "header.md"
        assert not [row for row in rows if row.endswith("|  |")]


def test_every_public_name_has_its_place():
    text = (pages.ROOT / "docs/reference/library.md").read_text()
    assert all(f"::: sparsify.{name}\n" in text for name in sparsify.__all__ if not name.startswith("_"))
