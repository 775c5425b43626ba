"""Text from files becomes Markdown that shows it, and nothing else."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sparsify.reports.words import markdown

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@given(st.text("ab1 -+=.)(#>*_`[]!<&;|~\\:/w\n\t\"'{}^$@\x1b\u2028", max_size=16) | st.text(max_size=16))
def test_any_text_is_one_paragraph_of_its_own_words(text):
    words = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029 ]+", " ", text).strip(" ")
    blocks = PARSER.parse(markdown(text))
    if words:
        assert [block.type for block in blocks] == ["paragraph_open", "inline", "paragraph_close"]
        assert {part.type for part in blocks[1].children} <= {"text", "text_special"}
        assert "".join(part.content for part in blocks[1].children).split() == words.split()


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("    x", " x"),
        ("- x", r"\- x"),
        ("1. x", r"1\. x"),
        ("1)", r"1\)"),
        ("===", r"\==="),
        ("-0.05", "-0.05"),
        ("a_b", "a_b"),
    ],
)
def test_what_begins_a_block_is_escaped_and_numbers_and_names_stay(text, escaped):
    assert markdown(text) == escaped
