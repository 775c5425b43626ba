"""What a model card may tell of a file: where the model comes from, and figures that were measured of it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm

from sparsify.errors import BadFile, SparsifyError
from sparsify.models import checkpoint, hub, names
from sparsify.report.files import read_json


def origin(header: checkpoint.Header) -> tuple[str, str]:
    """What was converted, in words for the card, and its name on the hub ('' where it has none)."""
    source, architecture = str(header.provenance.get("source") or ""), header.architecture["architecture"]
    if header.provenance.get("weights"):
        return f"`{architecture}` with a checkpoint of its owner's", ""
    if source.startswith(hub.SCHEMES):
        name = source.partition(":")[2].partition("@")[0]
        return f"[{name}](https://huggingface.co/{name})", name
    if source.startswith("local-dir:") or not source:
        return f"`{architecture}` with weights from a folder of its owner's", ""
    if source == names.DIGITS:
        return "The `digits` model that comes with sparsify", ""
    try:
        full = names.resolve(source).pretrained_name
        config = timm.get_pretrained_cfg(full)
    except (SparsifyError, RuntimeError):
        return f"`{source}`", ""
    place = (config.hf_hub_id if config else None) or ""
    name = f"{place}{full}" if place.endswith("/") else place
    return (f"[{full}](https://huggingface.co/{name})" if name else f"`{full}`"), name


def results(path: Path, digest: str) -> dict[str, Any]:
    """Results of `sparsify eval` with their conditions, if they are those of the file with this digest.

    Raises:
        BadFile: unreadable, without conditions, or of another file.
    """
    found = read_json(path)
    conditions = found.get("conditions")
    if not isinstance(conditions, dict) or not found.get("images"):
        raise BadFile(
            f"{path} has no results with their conditions: 'sparsify eval FILE --results-file NAME.json' writes them"
        )
    if conditions.get("file_sha256") != digest:
        raise BadFile(f"{path} has the results of another file: evaluate this one")
    return found


def times(path: Path, macs: int, params: int) -> dict[str, Any]:
    """Figures of `sparsify profile --json`, if they were measured of a model with as many MACs and parameters.

    Raises:
        BadFile: unreadable, nothing measured, or of another model.
    """
    found = read_json(path)
    if found.get("latency_ms_sparse") is None:
        raise BadFile(f"{path} has no measured times: 'sparsify profile FILE --json NAME.json' writes them")
    if (found.get("macs_sparse"), found.get("param_count")) != (macs, params):
        raise BadFile(f"{path} has the times of another model: profile this one")
    return found
