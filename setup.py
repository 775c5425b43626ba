"""The README as the package index shows it. All else is in pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def for_the_index(readme: str, repository: str) -> str:
    """Links to files of the repository become absolute, or plain text where pyproject.toml has no `urls.Repository`."""

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        return f"[{words}]({repository.rstrip('/')}/blob/main/{target})" if repository else words

    return re.sub(r"\[([^]]+)\]\(([^)\s]+)\)", link, readme)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=for_the_index(
            (ROOT / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Repository", "")
        ),
        long_description_content_type="text/markdown",
    )
