"""mkdocstrings: docstrings of the package as its pages show them (an extension of griffe, named in mkdocs.yml).

An `Example:` is Python, and what a function returns is one sentence: griffe takes what stands before its first colon for a
type.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

SECTION = re.compile(r"^(Example|Returns):\n((?:[ ]{4}.*\n?|\n)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **rest: Any) -> None:
        """Called for everything that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = fitted(obj.docstring.value)


def fitted(text: str) -> str:
    """A docstring whose examples are fenced and whose returned values are a paragraph."""

    def section(found: re.Match[str]) -> str:
        body = textwrap.dedent(found[2]).strip("\n")
        shown = f"```python\n{body}\n```" if found[1] == "Example" else "**Returns:** " + body
        return shown + "\n\n"

    return SECTION.sub(section, text).rstrip()
