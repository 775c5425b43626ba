"""mkdocs: files that live beside docs/ become pages of the site, so that nothing is written twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "NOTICE": "notice.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of `PAGES`."""
    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=as_page(source, (root / source).read_text(encoding="utf-8"))))
    return files


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """Links out of docs/ lead to the pages made of those files; in tables a figure and its unit stay together."""
    out = re.compile(r"\]\(\.\./([A-Z]\w+(?:\.md)?)(#[\w-]+)?\)")
    lines = out.sub(lambda m: f"]({PAGES.get(m[1], m[0])}{m[2] or ''})", markdown).split("\n")
    return "\n".join(re.sub(r"(\d) (%|[GMk]\b)", r"\1&nbsp;\2", i) if i.startswith("|") else i for i in lines)


def as_page(source: str, text: str) -> str:
    """A file of the repository's root as a page: its links as seen from docs/."""
    if not source.endswith(".md"):
        return f"# {source.capitalize()}\n\n```text\n{text}```\n"
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\]\(([A-Z]\w+(?:\.md)?)\)", lambda m: f"]({PAGES.get(m[1], m[1])})", text)
