"""mkdocs: pages that stand for a file of the repository's root show that file, so that nothing is written twice.

Such a page is a file of docs/ as well, with a link to the other one (`PAGES`); only its content is put in here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "NOTICE": "notice.md",
}
ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    """The file that the page stands for, if it does; links out of docs/ lead to pages.

    In tables a figure and its unit stay together.
    """
    for source, name in PAGES.items():
        if page.file.src_uri == name:
            markdown = as_page(source, (ROOT / source).read_text(encoding="utf-8"))
    out = re.compile(r"\]\(\.\./([A-Z]\w+(?:\.md)?)(#[\w-]+)?\)")
    lines = out.sub(lambda m: f"]({PAGES.get(m[1], m[0])}{m[2] or ''})", markdown).split("\n")
    return "\n".join(re.sub(r"(\d) (%|[GMk]\b)", r"\1&nbsp;\2", i) if i.startswith("|") else i for i in lines)


def as_page(source: str, text: str) -> str:
    """A file of the repository's root as a page: its links as seen from docs/."""
    if not source.endswith(".md"):
        return f"# {source.capitalize()}\n\n```text\n{text}```\n"
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\]\(([A-Z]\w+(?:\.md)?)\)", lambda m: f"]({PAGES.get(m[1], m[1])})", text)
