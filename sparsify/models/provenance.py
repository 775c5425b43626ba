"""What a file was made from, as far as it tells."""

from __future__ import annotations

from typing import NamedTuple

import timm

from sparsify.errors import SparsifyError
from sparsify.models import hub, names
from sparsify.models.checkpoint import Header
from sparsify.models.huggingface import families


class Origin(NamedTuple):
    """The model that was converted."""

    name: str  # of the model or of its architecture
    more: str = ""  # words that follow the name, or ''
    base: str = ""  # its repository on the hub, ORG/NAME; '' where it has none


def origin(header: Header) -> Origin:
    """The model that was converted. Folders and file names of the user's machine are not told."""
    source, architecture = str(header.provenance.get("source") or ""), header.architecture["architecture"]
    if header.provenance.get("module"):
        return Origin(architecture, " as its owner had it in Python")
    if header.provenance.get("weights"):
        return Origin(architecture, " with a checkpoint of its owner's")
    if source.startswith(hub.SCHEMES):
        name = source.partition(":")[2].partition("@")[0]
        kind = header.provenance.get("transformers")
        more = f" (a {kind} of Hugging Face transformers)" if isinstance(kind, str) and families.family(kind) else ""
        return Origin(name, more, name if hub.is_name(name) else "")
    if source.startswith("local-dir:") or not source:
        return Origin(architecture, " with weights from a folder of its owner's")
    if source == names.DIGITS:
        return Origin(source, " (the model that comes with sparsify)")
    try:
        full = names.resolve(source).pretrained_name
        config = timm.get_pretrained_cfg(full)
    except (SparsifyError, RuntimeError):
        return Origin(source)
    repository = (config.hf_hub_id if config else None) or ""
    return Origin(full, "", f"{repository}{full}" if repository.endswith("/") else repository)
