"""Recipes as YAML: of bounded size and depth, with JSON's scalars."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sparsify.errors import brief, one_line

LONGEST = 64 * 1024  # characters of YAML: a recipe has 2,000
DEEPEST = 20
MOST = 10_000  # values, those that aliases repeat counted again


def read_yaml(text: str) -> Any:
    """The YAML document in `text`; its scalars are those of JSON: null, true, false, numbers and strings.

    Raises:
        ValueError: one line with the line's number: not YAML, a field given twice, a tag, or longer than `LONGEST`, deeper
            than `DEEPEST` or of more than `MOST` values.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} characters")
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"line {mark.line + 1}: {what}" if mark else what) from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(one_line(error)) from None


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's, bounded, and with JSON's scalars."""

    yaml_implicit_resolvers: dict[Any, Any] = {  # noqa: RUF012
        None: [
            (f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{words})\Z"))
            for kind, words in {
                "null": "~|null|Null|NULL|",
                "bool": "true|True|TRUE|false|False|FALSE",
                "int": "[-+]?(0|[1-9][0-9_]{0,17})",
                "float": r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?",
                "merge": "<<",
            }.items()
        ]
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = self.values = 0
        self.sizes: dict[str, int] = {}  # values below each anchor

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML's, which nests without end and lets aliases multiply."""
        event = self.peek_event()
        anchor, before, is_alias = event.anchor, self.values, isinstance(event, yaml.AliasEvent)
        self.values += self.sizes.get(anchor, MOST if anchor in self.anchors else 1) if is_alias else 1
        self.depth += 1
        if self.depth > DEEPEST:
            raise _bad(f"nested more than {DEEPEST} deep", event)
        if self.values > MOST:
            raise _bad(f"more than {MOST} values, or an alias of what it stands in", event)
        if getattr(event, "tag", None) is not None:
            raise _bad(f"tags such as {brief(event.tag)} are not read: write the value without", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not is_alias:
            self.sizes[anchor] = self.values - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """As PyYAML's, which takes a name twice, and the last of its values."""
        node, names = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _bad("a list or mapping stands where a field's name is expected", key)
            if key.value in names:
                raise _bad(f"the field {brief(key.value)} is given twice", key)
            names.add(key.value)
        return node


class _PlainDumper(yaml.SafeDumper):
    """PyYAML's, which quotes what either reader would take for something else than a string."""

    yaml_implicit_resolvers: dict[Any, Any] = (
        yaml.SafeDumper.yaml_implicit_resolvers | _PlainLoader.yaml_implicit_resolvers
    )


def to_yaml(tree: Any) -> str:
    """`tree` as YAML that `read_yaml` reads, fields in their order."""
    return yaml.dump(tree, Dumper=_PlainDumper, sort_keys=False, default_flow_style=None, width=120)


def _bad(problem: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)
