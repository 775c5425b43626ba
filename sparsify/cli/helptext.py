"""`--help` as plain text that reads well on 80 columns: options in groups, defaults at the end, whole sentences.

`App` is a typer application whose commands are shown that way: an option's group is its `rich_help_panel`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from sparsify.cli import terminal

WIDTH = 100  # columns at most, in a wide terminal
OPTIONS = "Options"  # the group of options without a group
KEPT, FORM, LEARNING, FILES = "Keys and tokens", "Sparse attention", "Images and training", "Files"
# groups of options that several commands share
MODEL, INPUT, RUNNING, TALK = "Model", "Preprocessing and classes", "Running", "Messages"
LAST = (MODEL, INPUT, RUNNING, TALK)  # shown last
LEFT = 28  # columns for an option's name; a longer one has its own line


class App(typer.Typer):
    """`typer.Typer` with plain, grouped help for each command."""

    def __init__(self, **how: Any) -> None:
        how.setdefault("context_settings", {"help_option_names": ["-h", "--help"], "max_content_width": WIDTH})
        super().__init__(cls=Group, rich_markup_mode=None, **how)

    def command(self, name: str | None = None, **how: Any) -> Callable[[Any], Any]:
        """As typer's, with `Command`."""
        return super().command(name, **{"cls": Command} | how)


class Command(TyperCommand):
    """A command whose options are shown in groups."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Usage with NAME instead of {NAME}."""
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then each group in the order in which the options were declared, `LAST` last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                name = re.sub(" <[^>]*>$", "", record[0]) if param.param_type_name == "argument" else record[0]
                groups.setdefault(_group(param), []).append((name, tidy(record[1])))
        left = max(len(record[0]) for group in groups.values() for record in group if len(record[0]) <= LEFT)
        for name in sorted(groups, key=lambda name: LAST.index(name) if name in LAST else -1):
            with formatter.section(name):
                formatter.write_dl([(option.ljust(left), text) for option, text in groups[name]], col_max=left)


class Group(TyperGroup):
    """The list of commands, each with the first sentence of its help, then the options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands first."""
        named = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        shown = [(name, _first_sentence(command.help)) for name, command in named if command and not command.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(shown)
        records = [param.get_help_record(ctx) for param in self.get_params(ctx)]
        with formatter.section(OPTIONS):
            formatter.write_dl([record for record in records if record is not None])

    def make_context(self, *given: Any, **how: Any) -> Any:
        """Parses, which prints --help and --version; see `terminal.read_to_the_end`."""
        with terminal.read_to_the_end():
            return super().make_context(*given, **how)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; see `terminal.read_to_the_end`."""
        with terminal.read_to_the_end():
            return super().invoke(ctx)


def tidy(text: str) -> str:
    """Help of an option without typer's marks: '[default: (all); x>=1]' -> '[default: all]'."""
    words, bracket, extra = text.rpartition("  [")
    if not bracket:
        return text
    extra = re.sub(r"(^|; )required$", "", extra.removesuffix("]"))
    extra = re.sub(r"(^|; )[-\d.<=]*x[<>][-\d.<>=]*$", "", extra)  # 'x>=1', '0<=x<=1'
    default = re.fullmatch(r"default: \((.*)\)", extra)
    extra = f"default: {default[1]}" if default else extra
    return f"{words}  [{extra}]" if extra else words


def _group(param: Any) -> str:
    if param.param_type_name == "argument":
        return "Arguments"
    if param.name == "help":
        return TALK
    return getattr(param, "rich_help_panel", None) or OPTIONS


def _first_sentence(text: str | None) -> str:
    return re.split(r"(?<=\.)\s|\n\n", " ".join((text or "").split("\n\n")[0].split()))[0]
