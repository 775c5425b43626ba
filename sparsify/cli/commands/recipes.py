"""`sparsify recipes`: list them or print one."""

from __future__ import annotations

from typing import Annotated

from sparsify.cli import completion, terminal
from sparsify.cli.options import argument
from sparsify.errors import UsageError


def recipes(
    action: Annotated[str, argument("show", "'show' prints one recipe.", False, ["show"])] = "",
    name: Annotated[str, argument("NAME", "Recipe to show.", False, completion.recipes)] = "",
) -> None:
    """List the recipes, or print one.

    Example: sparsify recipes show distill
    """
    from sparsify.recipe import load_recipe, recipe_names, recipe_text

    if action not in ("", "show") or bool(action) != bool(name):
        raise UsageError("'sparsify recipes' lists the recipes, 'sparsify recipes show NAME' prints one")
    if action:
        terminal.lines(recipe_text(name))
        return
    for each in recipe_names():
        terminal.line(f"{each}  {load_recipe(each).description}")
