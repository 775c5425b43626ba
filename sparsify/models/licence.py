"""The licence of weights, in the hub's words and in plain ones: `licence_of` decides for every reader and writer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsify.models.header import Header

_IDENTIFIERS = (
    "apache-2.0 mit bsd-3-clause cc-by-4.0 cc-by-nc-4.0 cc-by-sa-4.0 cc-by-nc-sa-4.0 cc0-1.0 gemma openrail apple-ascl "
    "apple-amlr"
)
KNOWN = set(_IDENTIFIERS.split())  # the hub's identifiers of the licences that timm's weights have
_NON_COMMERCIAL = re.compile(r"(^|[-_ ])nc([-_ ]|$)|non-?commercial|research|amlr", re.IGNORECASE)
_UNKNOWN = "The licence of these weights is unknown: "


@dataclass(frozen=True)
class Licence:
    """A licence of weights."""

    name: str  # as given; '' where it is unknown
    note: str  # one sentence that a reader must know, or ''

    @property
    def identifier(self) -> str:
        """The hub's name for it: one of `KNOWN`, else `other`, or `unknown`."""
        lower = self.name.lower()
        return lower if lower in KNOWN else "other" if self.name else "unknown"

    @property
    def non_commercial(self) -> bool:
        return bool(_NON_COMMERCIAL.search(self.name))


def licence_of(header: Header, given: str | None = None) -> Licence:
    """The licence of the weights in a file: `given` by their owner, else that of the weights that were converted.

    A user's own checkpoint has the licence that its owner gives it: what timm says of the architecture's weights does not
    apply to it.
    """
    if given:
        return _licence(given)
    if header.provenance.get("weights"):
        return Licence("", _UNKNOWN + "they come from a checkpoint that does not say.")
    name = str(header.architecture["pretrained_cfg"].get("license") or "unknown")
    if name.lower() == "unknown":
        return Licence("", _UNKNOWN + "ask where the original was published before using them.")
    return _licence(name)


def _licence(name: str) -> Licence:
    note = f"The licence, {name}, forbids or restricts commercial use: read it before using the weights."
    return Licence(name, note if Licence(name, "").non_commercial else "")
