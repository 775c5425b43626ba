"""`sparsify models`: what can be converted."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsify.errors import UsageError
from sparsify.preflight import preflight


def models(pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with *.")] = "") -> None:
    """List the models that can be converted."""
    preflight()
    from sparsify import zoo

    found = zoo.listing(pattern)
    if not found:
        raise UsageError(f"no model matches '{pattern}': 'sparsify models' lists all")
    for name, note in found:
        print(f"{name}  {note}".rstrip())
