"""The package's imports as arrows between its rooms, read from the source by `ast`."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

ROOTS = {"errors", "version", "config", "recipe", "files", "extras", "processes", "progress"}

MAY_IMPORT: dict[str, set[str]] = {
    "cli": {"jobs", "reports", "measure", "models", "images", "ops", *ROOTS},
    "api": {"keywords", "jobs", "reports", "measure", "images", "models", "nn", "ops", *ROOTS},
    "keywords": {"processes"},
    "registry": {"models", "nn", *ROOTS},
    "jobs": {"fit", "reports", "measure", "models", "images", "nn", "ops", *ROOTS},
    "fit": {"reports", "measure", "images", "nn", "ops", *ROOTS},
    "reports": {"measure", "models", "images", *ROOTS},
    "measure": {"images", "nn", "ops", *ROOTS},
    "models": {"nn", *ROOTS},
    "images": {"nn", *ROOTS},
    "nn": {"ops", "config", "errors", "version"},
    "ops": {"errors", "files", "version"},
    "recipe": {"config", "files", "errors", "version"},
    "config": {"errors", "version"},
    "files": {"errors", "version"},
    "processes": {"extras", "errors", "version"},
    "progress": {"errors", "version"},
    "extras": {"errors", "version"},
    "errors": set(),
    "version": set(),
    "__main__": {"cli"},
    "": {"api", "config", "version"},  # the package's face, which resolves its names at first use
}
"""What each package or root module may import of the others; `docs/design.md` says why. From the top to the bottom."""


class Arrow(NamedTuple):
    """One module of the package imports another."""

    source: str
    target: str


def room(module: str) -> str:
    """The package, or the module lying flat in `sparsify/`, that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((root / "sparsify").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(root: Path) -> list[Arrow]:
    """Imports among the modules, inside functions and for type checking too; a package's own face aside."""
    known = modules(root)
    found = []
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sparsify":
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [each if each in known else node.module for each in whole]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names if alias.name.split(".")[0] == "sparsify"]
            found += [Arrow(name, target) for target in targets if target != name]
    return sorted(set(found))


def forbidden(found: list[Arrow]) -> list[Arrow]:
    """Arrows between two rooms that `MAY_IMPORT` does not have."""
    return [
        a
        for a in found
        if room(a.source) != room(a.target) and room(a.target) not in MAY_IMPORT.get(room(a.source), set())
    ]


def upward(found: list[Arrow]) -> list[Arrow]:
    """Arrows from a room to one above it."""
    order = {name: i for i, name in enumerate(MAY_IMPORT)}
    return [a for a in forbidden(found) if order.get(room(a.target), 0) < order.get(room(a.source), 0)]


def circles(found: list[Arrow]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (strongly connected; Tarjan 1972)."""
    ahead: dict[str, list[str]] = {}
    for a in found:
        ahead.setdefault(a.source, []).append(a.target)
        ahead.setdefault(a.target, [])
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for target in ahead[module]:
            if target not in number:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], number[target])
        if low[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in ahead:
        if module not in number:
            visit(module)
    return groups
