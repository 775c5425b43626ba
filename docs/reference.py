"""Writes the generated pages of docs/reference/ from docstrings and from the types of fields: `make reference`.

    python docs/reference.py            # write them
    python docs/reference.py --check    # name those that are not as this would write them (exit code 1)

`library.md` names the public functions and tabulates what they return; `recipes.md` and `header.md` are tables of fields.
Pages are committed, so that they can be read in the repository.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from pydantic import BaseModel

import sparsify
from sparsify import recipe
from sparsify.config import SparsityConfig, TokenLowrank, Tokens
from sparsify.models import checkpoint, header

FOLDER = Path(__file__).parent / "reference"
RECIPES = [
    recipe.Recipe, SparsityConfig, TokenLowrank, Tokens, recipe.Repair, recipe.Stage, recipe.Losses, recipe.Optimiser,
    recipe.Schedule, recipe.Augmentation, recipe.Anneal,
]  # fmt: skip
HEADER = [
    header.Architecture, header.Preprocessing, header.Provenance, header._Recipe, header._Stage, header._Calibration,
    header._Tuned, header._Report, header._Sureness,
]  # fmt: skip
WRITTEN = "<!-- written by docs/reference.py (make reference); edit the docstrings instead -->"


def pages() -> dict[str, str]:
    """The content of each page by its name."""
    return {"library.md": library(), "recipes.md": recipes(), "header.md": headers()}


# ---- the library ----


LIBRARY = """\
# The library

{written}

`import sparsify` has these names. It loads torch at the first use of one of them.

{names}

Every function raises `sparsify.errors.SparsifyError` for what a caller can mend, with one line that says what was wrong,
what was expected and what to do ([Errors](parts.md#errors)).

{directives}

## What the functions return

{results}
"""


def library() -> str:
    """The public names: a table, a directive of mkdocstrings for each, and the fields of what functions return."""
    names_of = sorted((name for name in sparsify.__all__ if not name.startswith("_")), key=str.lower)
    things = {name: getattr(sparsify, name) for name in names_of}
    functions = [thing for thing in things.values() if inspect.isfunction(thing)]
    first = sorted(things, key=lambda name: not inspect.isfunction(things[name]))  # functions before classes
    names = [[f"[`sparsify.{name}`](#sparsify.{name})", summary(things[name])] for name in first]
    results = [
        "\n".join([f"### {kind.__name__} {{ #{kind.__module__}.{kind.__name__} }}", "", *described(kind)])
        for kind in returned(functions)
    ]
    return LIBRARY.format(
        written=WRITTEN,
        names="\n".join(table(["name", "purpose"], names)),
        directives="\n\n".join(f"::: sparsify.{name}" for name in first),
        results="\n\n".join(results),
    )


def returned(functions: Any) -> list[type]:
    """Classes of this package that the functions return, by name."""
    found: set[type] = set()
    for function in functions:
        hint = typing.get_type_hints(function).get("return")
        for kind in (hint, *typing.get_args(hint)):
            if inspect.isclass(kind) and kind.__module__.startswith("sparsify."):
                found.add(kind)
    return sorted(found, key=lambda kind: kind.__name__)


def described(kind: type) -> Iterator[str]:
    """A class of figures: its docstring, its fields and its properties."""
    yield prose(inspect.getdoc(kind) or "")
    said, rows = meanings(kind), []
    if any(said.values()):  # otherwise the docstring says them
        rows = [[f"`{name}`", f"`{hint}`", said.get(name, "")] for name, hint in annotations(kind).items()]
    for name, value in vars(kind).items():
        if not name.startswith("_") and (isinstance(value, property) or inspect.isfunction(value)):
            doc = summary(value.fget if isinstance(value, property) else value)
            hint = inspect.signature(value.fget if isinstance(value, property) else value).return_annotation
            rows.append([f"`{name}`" if isinstance(value, property) else f"`{name}()`", f"`{hint}`", doc])
    yield ""
    yield from table(["field", "type", "meaning"], rows)


# ---- recipes and headers ----


RECIPE = """\
# Fields of a recipe

{written}

A recipe is a YAML file; what it does: [Fine-tuning](../training.md). Fields that are left out have their default. Any other
field is refused by its name. `--set stages.0.epochs=3` sets a field by its path, and so does `Recipe.set`. Fields of
`SparsityConfig` are also those of `sparsify.SparsityConfig`.

```yaml
description: a few steps, without labels
sparsity: {{keep: 0.05, tail: mean}}
stages:
  - {{name: distill, steps: 8, losses: {{logits: 1.0}}, optimiser: {{lr: 5.0e-5}}}}
```

{tables}

Files and recipes of the first versions have `spread_rank: true|false` instead of `spread: rank|none`.
"""

FILE = """\
# Header of a model file

{written}

A model is one safetensors file. Its metadata have these keys; values are JSON or plain text:

{keys}

`sparsify.config` has the fields of [`SparsityConfig`](recipes.md#sparsityconfig), complete. The tables below are what
commands read of the others. A file in which one of them has another type or range is refused by its name
([Security](../security.md)); further fields may be any JSON.

```python
import json
from safetensors import safe_open

with safe_open("model.safetensors", framework="pt") as file:
    about = json.loads(file.metadata()["sparsify.provenance"])
print(about["source"], about["date"])
```

{tables}
"""


def recipes() -> str:
    """Every field of a recipe."""
    return RECIPE.format(written=WRITTEN, tables=tables(RECIPES, True))


def headers() -> str:
    """Every key of a file's header, and the fields that commands read of it."""
    keys = textwrap.dedent((checkpoint.__doc__ or "").partition("plain text):\n\n")[2]).strip("\n").split("\n")
    rows: list[list[str]] = []
    for line in keys:
        if line.startswith(" "):
            rows[-1][1] += " " + line.strip()
        else:
            name, _, words = line.partition(" ")
            rows.append([f"`{name}`", words.strip()])
    return FILE.format(written=WRITTEN, keys="\n".join(table(["key", "content"], rows)), tables=tables(HEADER, False))


def tables(models: Sequence[type[BaseModel]], defaults: bool) -> str:
    """A section for each model: its docstring and its fields."""
    sections = ([f"## {title(m)}", "", prose(inspect.getdoc(m) or ""), "", *fields(m, defaults)] for m in models)
    return "\n\n".join("\n".join(section) for section in sections)


def fields(model: type[BaseModel], defaults: bool) -> list[str]:
    """A table of a model's fields."""
    said, rows = meanings(model), []
    hints = typing.get_type_hints(model, include_extras=True)
    for name, value in model.model_fields.items():
        row = [f"`{name}`", words(hints[name])]
        if defaults:
            row.append("" if value.is_required() else plain(value.default))
        rows.append([*row, said[name]])
    return table(["field", "value", *["default"] * defaults, "meaning"], rows)


def words(hint: Any) -> str:
    """The values that a type allows."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return words(parts[0]) + span(parts[1:])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(words, parts)))
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return f"list of ({words(parts[0])})"
        return f"[{len(parts)} values: {', '.join(dict.fromkeys(map(words, parts)))}]"
    if inspect.isclass(hint) and issubclass(hint, BaseModel):
        return f"[{title(hint)}](#{title(hint).lower()})"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", NoneType: "null"}
    return names.get(hint, "mapping" if origin is dict else "any")


def span(metadata: Iterable[Any]) -> str:
    """' from 0 to 1', ' above 0': the range of a number, ' up to 200 characters'."""
    inner = [each for about in metadata for each in getattr(about, "metadata", ())]
    found = {kind: getattr(each, kind) for each in inner for kind in ("ge", "gt", "le", "lt") if hasattr(each, kind)}
    named = (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below"))
    return "".join(f" {name} {found[kind]:,}" for kind, name in named if abs(found.get(kind, 1e9)) < 1e9)


def plain(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, tuple):
        return f"`[{', '.join(f'{each:.4g}' if isinstance(each, float) else str(each) for each in value)}]`"
    if isinstance(value, bool) or value in (None, ""):
        return {True: "`true`", False: "`false`", None: "`null`"}.get(value, "empty")
    return f"`{value}`"


def title(model: type) -> str:
    return model.__name__.strip("_")


# ---- docstrings ----


def meanings(kind: type) -> dict[str, str]:
    """What stands beside each field in the source: the docstring after it, or the comment on its line or above it."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines, body = source.split("\n"), typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    found: dict[str, str] = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            text = after.value.value
        else:
            text = lines[(node.end_lineno or 1) - 1][node.end_col_offset :].partition("#")[2]
            above = node.lineno - 2
            if not text and lines[above].strip().startswith("#"):
                first = above
                while lines[first - 1].strip().startswith("#"):
                    first -= 1
                text = " ".join(line.strip(" #") for line in lines[first : above + 1])
        found[node.target.id] = " ".join(text.split())
    return found


def annotations(kind: type) -> dict[str, str]:
    """Fields and their types as the source has them."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]).body
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    }


def summary(thing: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def prose(doc: str) -> str:
    """A docstring's paragraphs before its sections, as Markdown."""
    before = doc
    for section in ("Args:", "Returns:", "Raises:", "Attributes:"):
        before = before.partition(f"\n{section}")[0]
    return re.sub(
        r"(?<=\n\n)((?:(?: {4}.*)?\n)* {4}.*)", lambda m: f"```text\n{textwrap.dedent(m[0])}\n```", before.strip()
    )


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """A table of Markdown."""
    line = "| " + " | ".join("---" for _ in headings) + " |"
    return [f"| {' | '.join(headings)} |", line, *(f"| {' | '.join(map(cell, row))} |" for row in rows)]


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    stale = []
    for name, text in pages().items():
        path = FOLDER / name
        if arguments == ["--check"]:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(
            f"docs/reference/{', '.join(stale)}: not what docs/reference.py writes; run make reference", file=sys.stderr
        )
    return bool(stale)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
