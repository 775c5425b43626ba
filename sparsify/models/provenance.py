"""The licence of a file's weights, as far as the file tells, in the hub's words and in plain ones."""

from __future__ import annotations

import re
from dataclasses import dataclass

import timm

from sparsify.errors import SparsifyError
from sparsify.models import checkpoint, hub, names
from sparsify.models.checkpoint import Header

KNOWN = {
    "apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0", "cc0-1.0",
    "gemma", "openrail", "apple-ascl", "apple-amlr",
}  # fmt: skip
"""Those of the hub's identifiers that timm's weights have; any other goes under `other` with its name."""
_NON_COMMERCIAL = re.compile(r"(^|[-_ ])nc([-_ ]|$)|non-?commercial|research|amlr", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """name: as given, '' where it is unknown; note: what a reader must know of it, one sentence, or ''."""

    name: str
    note: str

    @property
    def identifier(self) -> str:
        """What the hub calls it: one of its own identifiers, `other` or `unknown`."""
        lower = self.name.lower()
        return lower if lower in KNOWN else "other" if self.name else "unknown"

    @property
    def non_commercial(self) -> bool:
        return bool(_NON_COMMERCIAL.search(self.name))


def licence_of(header: Header, given: str | None = None) -> Licence:
    """The licence of the weights in a file: `given` by its owner, else that of the weights that were converted.

    A checkpoint of the user's own has the licence that its owner gives it: what timm says of the architecture's weights
    is no answer there.
    """
    if given:
        return Licence(given, _warning(Licence(given, "")))
    own = header.provenance.get("weights")
    named = header.architecture.get("pretrained_cfg", {}).get("license")
    if own:
        return Licence("", "The licence of these weights is unknown: they come from a checkpoint that does not say.")
    if not named or str(named).lower() == "unknown":
        return Licence(
            "", "The licence of these weights is unknown: ask where the original was published before using them."
        )
    return Licence(str(named), _warning(Licence(str(named), "")))


def _warning(licence: Licence) -> str:
    if licence.non_commercial:
        return f"The licence, {licence.name}, forbids or restricts commercial use: read it before using the weights."
    return ""


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
