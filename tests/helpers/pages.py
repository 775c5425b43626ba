"""Code blocks of the Markdown pages, and small stand-ins for what they name.

A page says `deit_small`, `model.safetensors`, `PATH`: models that would be downloaded, files that the reader made, folders
of the reader's. `Bench` lays small ones of the same names into a folder, and `Bench.fitted` replaces the names that are no
file's (`NAMES`), so that a block runs as it is printed otherwise.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import typer
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import save_file

import sparsify
from helpers.families import raise_attention
from sparsify.cli.app import app, main

ROOT = Path(__file__).resolve().parents[2]
MODEL = "local-dir:deit_small"  # of the folder that `Bench` makes: two narrow blocks, random weights, 224 pixels
NAMES = {
    '"deit_small"': f'"{MODEL}"',
    "hf-hub:ORG/NAME": "local-dir:FOLDER",
    "out_indices=(3, 7, 11)": "out_indices=(0, 1)",  # of two blocks
    "--layer 1,6,12": "--layer 1,2",
}
FOLDERS = ("FOLDER", "PATH", "imagenet", "IMAGENET", "photos", "images", "my_images", "my_images_by_class")
"""Folders of eight labelled images that pages name."""
PROGRAMS = {
    "accelerate",
    "cut",
    "head",
    "make",
    "pip",
    "python",
    "source",
    "sparsify",
    "uv",
    "uvicorn",
    "torchrun",
    "export",
}
"""What a line of a shell block may begin with."""


class Block(NamedTuple):
    """A code block of a page."""

    page: str  # path from the repository's root
    line: int  # of its first line, from 1
    language: str  # python, sh, console, yaml, text; '' where nothing says it and it cannot be told
    title: str  # the file that it is to be written to, or ''
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Every page of the documentation, README and CONTRIBUTING, from the repository's root."""
    found = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def blocks(page: str) -> list[Block]:
    """The code blocks of a page, fenced and indented ones, also in lists."""
    found = []
    for token in MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block") and not _directive(page, token):
            words = token.info.partition(" ")
            title = re.search(r'title="(.+?)"', words[2])
            language = words[0] or guess(token.content)
            found.append(Block(page, (token.map or [0])[0] + 1, language, title[1] if title else "", token.content))
    return found


def _directive(page: str, token: object) -> bool:
    """Options of mkdocstrings below a line ':::'."""
    return getattr(token, "type", "") == "code_block" and getattr(token, "content", "").startswith("options:\n")


def guess(text: str) -> str:
    """The language of a block that does not say it: sh, python, or ''."""
    first = [line.split()[0] for line in text.splitlines() if line.strip()]
    if first and first[0] in PROGRAMS:
        return "sh"
    with contextlib.suppress(SyntaxError):
        tree = ast.parse(text)
        if any(isinstance(node, ast.Import | ast.ImportFrom | ast.Call) for node in ast.walk(tree)):
            return "python"
    return ""


# ---- the shell ----


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, one for each program of a pipe, without comments and without what they print."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.commenters, lexer.whitespace_split = "#", True
        command: list[str] = []
        for word in [*lexer, "|"]:
            if set(word) <= set("|&;<>"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def check_command(words: list[str]) -> None:
    """Raise where a command of the project does not exist as written: its name, its options and the form of their values.

    Programs of others are only known by name (`PROGRAMS`).
    """
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # OMP_NUM_THREADS=2 sparsify ...
        words = words[1:]
    name, *arguments = words
    assert name in PROGRAMS or Path(name).suffix, f"'{name}' is no program that pages use"
    if name in ("accelerate", "torchrun", "python") and "sparsify" in arguments:
        name, arguments = "sparsify", arguments[arguments.index("sparsify") + 1 :]
    if name == "sparsify":
        parse(arguments)
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [each for each in arguments if "=" not in each and each not in targets]
        assert not unknown, f"make has no target {unknown}"
    elif name in ("pip", "uv"):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"(?:sparsify-vit|\.)\[([\w,]+)\]", " ".join(arguments))
        unknown = [each for part in extras for each in part.split(",") if each not in project["optional-dependencies"]]
        assert not unknown, f"no extra {unknown}"


def parse(arguments: list[str]) -> None:
    """Parse a command line as `sparsify` does, without running it."""
    group = typer.main.get_command(app)
    context = group.context_class(group, info_name="sparsify")
    _, rest, _ = group.make_parser(context).parse_args(list(arguments))  # a callback of the group would act
    if rest:
        name, command, left = group.resolve_command(context, rest)
        assert command is not None, f"no command {rest[0]}"
        command.make_context(name, left, parent=context)


# ---- stand-ins ----


class Bench:
    """A folder with small stand-ins; a file is made when a page first names it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        arguments = {"depth": 2, "embed_dim": 128, "num_heads": 2}
        model = raise_attention(timm.create_model("deit_small_patch16_224", **arguments))
        (folder / "deit_small").mkdir()
        save_file(model.state_dict(), folder / "deit_small" / "model.safetensors")
        config = {"architecture": "deit_small_patch16_224", "num_classes": 1000, "model_args": arguments}
        (folder / "deit_small" / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {}}))
        for i, name in enumerate(("cat.jpg", "dog.jpg", "a.jpg", "b.jpg")):
            Image.effect_noise((160, 120), 40 + 10 * i).convert("RGB").save(folder / name)
        for name in FOLDERS:
            for label in ("0", "1"):
                (folder / name / label).mkdir(parents=True)
                for i in range(4):
                    Image.effect_noise((64, 48), 20 + 5 * i).convert("RGB").save(folder / name / label / f"{i}.jpg")
        sparsify.convert(
            MODEL, output=folder / "model.safetensors", target_macs=[0.7, 0.55, 0.4], calib_images=8, seed=0
        )

    def provide(self, text: str) -> None:
        """Make what `text` names beside the model: programs, a repository in a folder."""
        model = self.folder / "model.safetensors"
        for name, format in (("model.onnx", "onnx"), ("model.pt2", "pt2"), ("model.xml", "openvino")):
            if name in text and not (self.folder / name).exists():
                sparsify.export(model, format, self.folder / name, measure=False)
        if "local-dir:FOLDER" in text or "ORG/NAME" in text:
            self._run("push", model, "ORG/NAME", "-o", self.folder / "FOLDER", "--force", "-q")
        if "patches.safetensors" in text:
            self._run(
                "predict",
                model,
                self.folder / "photos",
                "--features",
                "patch",
                "-o",
                self.folder / "patches.safetensors",
            )
        if "dinov2.safetensors" in text:
            shutil.copy(model, self.folder / "dinov2.safetensors")

    @staticmethod
    def _run(*arguments: object) -> None:
        """A command line of sparsify, which has to succeed."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                main([str(each) for each in arguments])
        except SystemExit as done:
            assert not done.code, arguments

    @staticmethod
    def fitted(text: str) -> str:
        """`text` with the names of `NAMES` replaced."""
        for name, other in NAMES.items():
            text = text.replace(name, other)
        return text
