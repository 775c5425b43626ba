"""`sparsify models`: what can be converted."""

from __future__ import annotations

from typing import Annotated

from sparsify.cli import completion, terminal
from sparsify.cli.options import argument
from sparsify.cli.preflight import preflight
from sparsify.errors import UsageError, as_options


def models(
    pattern: Annotated[str, argument("PATTERN", "Part of a name, or a pattern with *.", "all", completion.models)] = "",
) -> None:
    """List the models that can be converted, a name a line with where its weights come from.

    Example: sparsify models 'vit_*dinov2*'
    """
    preflight()
    from sparsify.models import building

    found = building.listing(pattern)
    if not found:
        raise UsageError(f"no model matches '{pattern}': 'sparsify models' lists all")
    for name, note in found:
        terminal.line(as_options(f"{name}  {note}").rstrip())
