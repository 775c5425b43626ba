"""Names for what is written down and may be published: nothing of the machine."""

from __future__ import annotations


def place(name: str, parts: int = 2) -> str:
    """A data set's or a model's name; of a path the last `parts` parts: '/home/me/photos/val' -> 'photos/val'."""
    found = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    return "/".join(found[-parts:]) or name
