"""`sparsify models`: what can be converted."""

from __future__ import annotations

import fnmatch
from typing import Annotated

from sparsify.cli import completion, parsers, terminal
from sparsify.cli.options import argument, option
from sparsify.cli.preflight import preflight
from sparsify.errors import UsageError, as_options

FORMS = ("timm", "hf")


def models(
    pattern: Annotated[str, argument("PATTERN", "Part of a name, or a pattern with *.", "all", completion.models)] = "",
    form: Annotated[
        str, option("FORM", "Library of the checkpoints: timm or hf (transformers).", words=FORMS, names="--from")
    ] = "timm",
) -> None:
    """List the models that can be converted, one per line, with the source of their weights.

    Example: sparsify models 'vit_*dinov2*', sparsify models --from hf
    """
    parsers.one_of("--from", form, FORMS)
    preflight()
    if form == "hf":
        from sparsify.models.huggingface import configs

        shell = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
        found = [row for row in configs.known() if fnmatch.fnmatch(row[0], shell)]
    else:
        from sparsify.models import building

        found = building.listing(pattern)
    if not found:
        raise UsageError(f"no model matches '{pattern}': 'sparsify models' lists all")
    for name, note in found:
        terminal.line(as_options(f"{name}  {note}").rstrip())
