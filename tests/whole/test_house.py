"""The structure of `docs/design.md`: what each package may import and load, and where things lie."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from helpers import house
from sparsify.errors import UsageError
from sparsify.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
ARROWS = house.arrows(ROOT)


def test_every_import_is_allowed_by_the_table_of_packages():
    assert house.forbidden(ARROWS) == []


def test_no_module_imports_itself_through_others():
    assert house.circles(ARROWS) == []


def test_the_table_names_every_room():
    assert {house.room(name) for name in house.modules(ROOT)} == set(house.MAY_IMPORT)


def test_the_table_itself_has_no_arrow_up():
    order = list(house.MAY_IMPORT)
    for name in order[:-2]:  # `__main__` and the face stand below and look up
        assert all(order.index(target) > order.index(name) for target in house.MAY_IMPORT[name])


# ---- files ----


def test_files_of_packages_hold_a_docstring_and_nothing_else():
    for path in (ROOT / "sparsify").rglob("__init__.py"):
        if path.parent.name in ("sparsify", "api"):  # the public names
            continue
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        assert ast.get_docstring(tree) and len(tree.body) == 1, path
        assert len(text.splitlines()) <= 15, path


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    sources = [path for ending in ("*.py", "*.cpp", "*.h") for path in (ROOT / "sparsify").rglob(ending)]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in sources if "__pycache__" not in path.parts}
    assert set(settings["packages"]) == folders | {"sparsify.recipes"}
    assert settings["package-dir"]["sparsify.recipes"] == "recipes"


def test_tests_lie_in_the_folder_of_their_package_and_import_no_other_test():
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    assert {path.parent.name for path in tests} <= set(house.MAY_IMPORT) - {""} | {"whole"}
    others = {path.stem for path in tests} | {path.parent.name for path in tests} | {"tests", "conftest"}
    for path in tests:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and not others & set((node.module or "").split(".")[:1]), path
            elif isinstance(node, ast.Import):
                assert not others & {alias.name.split(".")[0] for alias in node.names}, path


# ---- messages ----


def test_messages_of_the_library_name_fields_not_options():
    """`errors.field` marks an argument; a command to type, in quotes or in a report, names options."""
    named = []
    for path in sorted((ROOT / "sparsify").rglob("*.py")):
        if {"cli", "reports"} & set(path.parts):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docstrings]
        named += [(path.name, t) for t in texts if isinstance(t, str) and re.search(r"\S.*\s--[a-z]|^--[a-z-]+ ", t)]
    commands = ("'sparsify ",)
    assert [each for each in named if not any(command in each[1] for command in commands)] == []


def test_a_field_is_an_argument_in_python_and_an_option_at_the_terminal():
    with pytest.raises(UsageError) as error:
        Recipe().set(["stages.9.epochs=1"])
    assert str(error.value).startswith("set stages.9.epochs: no item")
    assert error.value.for_command_line().startswith("--set stages.9.epochs: no item")


# ---- what an import loads ----

HEAVY = "torch timm fvcore matplotlib jinja2 tensorboard accelerate onnx torchvision sklearn".split()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("sparsify", HEAVY),
        ("sparsify.cli.app", HEAVY),
        ("sparsify.processes", HEAVY),
        ("sparsify.recipe", HEAVY),
        ("sparsify.files.outputs", HEAVY),
        ("sparsify.models.hub", HEAVY),
        ("sparsify.reports.words", HEAVY),
        ("sparsify.ops.reference", HEAVY[1:]),
        ("sparsify.api", "fvcore matplotlib jinja2 tensorboard onnx sklearn".split()),
    ],
)
def test_an_import_loads_no_more_than_it_needs(module, heavy):
    code = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr
