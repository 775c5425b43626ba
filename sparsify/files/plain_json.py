"""Results as JSON, which has no NaN or infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.errors import BadFile, one_line


def from_json(text: str | bytes, **options: Any) -> Any:
    """What JSON text holds, by `json.loads`; `ValueError` also where it is nested too deep for that."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a command wrote; `BadFile`: missing, not JSON, or JSON of another type."""
    if not path.exists():
        raise BadFile(f"no file {path}")
    try:
        tree = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read as JSON: {one_line(error, 100)}") from None
    if not isinstance(tree, dict):
        raise BadFile(f"{path} holds no results: an object of JSON is expected")
    return tree


def to_json(tree: Any, **options: Any) -> str:
    """`tree` as JSON by `json.dumps`; a number that is not finite, which JSON does not have, becomes null."""
    return json.dumps(_known(tree), allow_nan=False, **options)


def _known(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _known(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_known(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
