"""The measures of the package's structure, as a Markdown table: `make house`.

    python benchmarks/house.py [--root DIR]

DIR is a checkout of this project; the default is the one that this file lies in. Everything is read from the source by
`ast`; nothing of the package is imported.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers import house  # noqa: E402

MOST = 8  # parameters of a function


def functions(root: Path) -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method of the package, with its file."""
    for path in sorted((root / "sparsify").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Named parameters, `self` and `cls` aside; *args and **options count as one each."""
    arguments = node.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return (
        len([n for n in named if n not in ("self", "cls")])
        + (arguments.vararg is not None)
        + (arguments.kwarg is not None)
    )


def is_schema(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the signature is a schema of torch.library, a Triton kernel's, or overrides one of timm's: its parameters are
    not ours to choose."""
    text = " ".join(map(ast.unparse, node.decorator_list))
    return (
        "custom_op" in text or "triton.jit" in text or "register_model" in text or node.name == "forward_intermediates"
    )


def is_command(path: Path) -> bool:
    return "commands" in path.parts


def crowded(root: Path) -> list[str]:
    """Functions with more than `MOST` parameters, commands and schemas aside."""
    return [
        f"{path.relative_to(root)}:{node.lineno} {node.name} ({parameters(node)})"
        for path, node in functions(root)
        if parameters(node) > MOST and not is_command(path) and not is_schema(node)
    ]


def twins(root: Path) -> dict[str, list[str]]:
    """Public classes that share their name with another, by name."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / "sparsify").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path.relative_to(root)))
    return {name: places for name, places in found.items() if len(places) > 1}


def measures(root: Path) -> dict[str, int]:
    """The figures of the table."""
    sources = sorted((root / "sparsify").rglob("*.py"))
    text = [path.read_text(encoding="utf-8") for path in sources]
    public = [
        parameters(node)
        for path, node in functions(root)
        if not node.name.startswith("_") and not is_command(path) and not is_schema(node)
    ]
    arrows = house.arrows(root)
    return {
        "Python files lying flat in `sparsify/`": len(list((root / "sparsify").glob("*.py"))),
        "import circles": len(house.circles(arrows)),
        "upward arrows": len(house.upward(arrows)),
        f"functions with more than {MOST} parameters, commands and schemas aside": len(crowded(root)),
        "most parameters of a public function": max(public),
        "`fmt: skip` in the package": sum(each.count("fmt: skip") for each in text),
        "lines of Python in `sparsify/`": sum(each.count("\n") for each in text),
        "public classes that share a name with another": sum(map(len, twins(root).values())),
        "README, lines": (root / "README.md").read_text(encoding="utf-8").count("\n"),
        "files in `tests/`, flat": len([p for p in (root / "tests").glob("*.py") if p.name != "conftest.py"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--names", action="store_true", help="name crowded functions and shared class names")
    arguments = parser.parse_args()
    print("| | now |\n|---|---|")
    for what, figure in measures(arguments.root).items():
        print(f"| {what} | {figure:,} |")
    if arguments.names:
        print("", *crowded(arguments.root), "", sep="\n")
        for name, places in twins(arguments.root).items():
            print(f"{name}: {', '.join(places)}")


if __name__ == "__main__":
    main()
