"""What a shell and its pipes see: completion, help on 80 columns, colours, a reader that has gone, poor encodings."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import timm
import typer
from rich.table import Table
from rich.text import Text

from helpers.error_lines import the_error
from sparsify import config
from sparsify.cli import completion, helptext, options, tables, terminal
from sparsify.cli.app import app, main
from sparsify.cli.helptext import tidy
from sparsify.cli.progress import Reporter
from sparsify.errors import BadFile, SparsifyError
from sparsify.models import building, names
from sparsify.ops import backends
from sparsify.processes import DTYPES, Compute
from sparsify.recipe import recipe_names

HERE = Path(__file__).resolve().parents[2]
GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return kept | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])} | changes


def spoken(*arguments, **changes):
    """Exit code, stdout and stderr of a command of its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "sparsify", *arguments], capture_output=True, env=environment(**changes), timeout=60
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def offered(line, capsys, monkeypatch):
    """What bash is offered at the end of `line`."""
    monkeypatch.setenv("_SPARSIFY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    return capsys.readouterr().out.split()


# completion


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sparsify ev", {"eval"}),
        ("sparsify convert deit_s", {"deit_small", "deit_small_distilled", "deit_small_patch16_224"}),
        ("sparsify sweep dig", {"digits"}),
        ("sparsify convert hf", {"hf-hub:"}),
        ("sparsify profile --dense dig", {"digits"}),
        ("sparsify recipes show paper-d", {"paper-digits", "paper-distill"}),
        ("sparsify convert digits --recipe lab", {"labels"}),
        ("sparsify convert digits --token-way e", {"evit", "evit-fused"}),
        ("sparsify eval --backend r", {"reference"}),
        ("sparsify eval --device c", {"cpu", "cuda"}),
        ("sparsify eval --kernel-p", {"--kernel-precision"}),
    ],
)
def test_tab_offers_what_can_stand_there(line, expected, capsys, monkeypatch):
    found = offered(line, capsys, monkeypatch)
    assert expected <= set(found) and all(word.startswith(line.split(" ")[-1]) for word in found)


@pytest.mark.parametrize(
    "line", ["sparsify profile mod", "sparsify convert digits --weights w", "sparsify convert swin_"]
)
def test_tab_offers_files_where_no_name_fits(line, capsys, monkeypatch):
    assert offered(line, capsys, monkeypatch) == []  # bash (-o default), zsh (_files) and fish turn to files then


def test_words_of_completion_are_those_of_the_options():
    fields = config.SparsityConfig.model_fields
    assert completion.BACKENDS == backends.BACKENDS and completion.KERNEL_PRECISIONS == backends.PRECISIONS
    assert get_args(fields["predictor"].annotation) == completion.PREDICTORS
    assert get_args(fields["tail"].annotation) == completion.TAILS
    assert get_args(fields["granularity"].annotation) == completion.GRANULARITIES
    assert get_args(config.Tokens.model_fields["way"].annotation) == completion.WAYS
    assert [str(Compute(dtype=name).torch_dtype) for name in DTYPES] == [f"torch.{name}" for name in DTYPES]
    assert completion.recipes("") == recipe_names()


@pytest.mark.parametrize("pattern", ["deit*", "*tiny*"])
def test_names_offered_are_those_that_can_be_converted(pattern):
    """`make names` writes the list anew."""
    listed = {name for name, _ in building.listing(pattern)}
    written = {name for name in completion.models("") if re.fullmatch(pattern.replace("*", ".*"), name)}
    assert listed <= written and {*names.ALIASES, names.DIGITS} <= set(completion.models(""))
    assert {name for name in written if name in listed or timm.is_model(name)} <= listed  # older timms know fewer


def test_a_real_shell_completes(tmp_path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    command = tmp_path / "sparsify"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sparsify "$@"\n')
    command.chmod(0o755)
    script = """
        eval "$(_SPARSIFY_COMPLETE=source_bash sparsify)"
        COMP_WORDS=(sparsify convert dei); COMP_CWORD=2
        "$(complete -p sparsify | sed 's/.*-F \\([^ ]*\\).*/\\1/')" sparsify
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, env=environment(PATH=path), timeout=60)
    assert "deit_small" in done.stdout.split() and not done.stderr


def test_help_version_and_completion_do_not_import_what_is_slow():
    probe = """
import os, sys
from sparsify.cli.app import main
def call(*arguments):
    try: main(list(arguments))
    except SystemExit: pass
call("--help"); call("--version"); call("convert", "--help"); call("recipes")
os.environ |= {"_SPARSIFY_COMPLETE": "complete_bash", "COMP_WORDS": "sparsify convert dei", "COMP_CWORD": "2"}
call()
print(sorted({"torch", "timm", "numpy", "rich.progress", "matplotlib"} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, env=environment())
    assert out.stdout.splitlines()[-1] == "[]" and "deit_small" in out.stdout


# help


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_and_has_an_example(name, width, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = run(name, "--help")
    lines = out.splitlines()
    assert code == 0 and not err and max(map(len, lines)) <= width
    assert any(line.startswith(f"  Example: sparsify {name} ") for line in lines)
    assert all(param.help for param in GROUP.commands[name].params if param.name != "help")
    assert not re.search(r"\bx[<>]|\[required\]|default: \(|[{}<]|\[\[|>$|\.\.\.\.", out, re.MULTILINE)


def test_help_names_every_command_whole_and_the_exit_codes(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("--help")
    assert run() == (code, out, "")  # nothing asked: the help
    words = " ".join(out.split())
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert all(f" {name} " in words for name in COMMANDS) and "..." not in words.partition("Commands:")[2]
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for exit_code in ("0", "1", "2", "130", "141"):
        assert re.search(rf"^ +{exit_code} +\w", out, re.MULTILINE)
        assert re.search(rf"Exit codes:[^\n]*\n?[^\n]*\b{exit_code} ", readme)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Keys.  [default: (all; or some); x>=1]", "Keys.  [default: all; or some]"),
        ("Keys.  [default: 4; 0<=x<=1]", "Keys.  [default: 4]"),
        ("Keys.  [x>=0]", "Keys."),
        ("Name.  [required]", "Name."),
        ("Name [of it].", "Name [of it]."),
    ],
)
def test_a_default_is_shown_as_people_write_it(text, shown):
    assert tidy(text) == shown


def test_terms_of_the_options_are_in_the_glossary():
    """Every option that says what a sparse model is or how it is made, and every word that such an option takes."""
    rows = (HERE / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    cells = [row.replace(r"\|", "").split("|") for row in rows if row.startswith("| ")]
    named = set(re.findall(r"--[a-z-]+", " ".join(row[1] for row in cells)))
    panels = {helptext.KEPT, helptext.FORM, helptext.LEARNING}
    plain = {"--set", "--data", "--val", "--seed", "--resume", "--save-minutes"}  # they say it themselves
    asked = {
        param.opts[0] for param in GROUP.commands["convert"].params if getattr(param, "rich_help_panel", "") in panels
    }
    asked |= {"--dense", "--backend", "--kernel-precision", "--count-as", "--targets", "--keeps", "--calib"}
    assert len(asked - plain) >= 20 and not asked - plain - named
    words = {
        *completion.PREDICTORS,
        *completion.TAILS,
        *completion.WAYS,
        *completion.IMPORTANCES,
        *completion.GRANULARITIES,
        *completion.BACKENDS,
    }
    assert not [word for word in words if not any(f"`{word}`" in row[1] + row[3] for row in cells)]


# streams


class Stream(io.TextIOWrapper):
    """A stream with an encoding, a terminal or none."""

    def __init__(self, encoding="utf-8", tty=False):
        super().__init__(io.BytesIO(), encoding=encoding)
        self.tty = tty

    def isatty(self):
        return self.tty

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


def wide(times=30):
    table = Table(box=None, pad_edge=False)
    table.add_column("module", overflow="ellipsis", no_wrap=True)
    table.add_column("MACs", no_wrap=True, justify="right")
    table.add_row(Text("blocks." * times, style="bold red"), "1.25 G")
    return table


@pytest.fixture
def shell(monkeypatch):
    """Sets stdout and stderr to streams of that kind, with nothing said about colours: (stdout, stderr)."""

    def use(encoding="utf-8", tty=False, **variables):
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"TERM": "xterm-256color", "COLORTERM": ""} | variables).items():
            monkeypatch.setenv(name, value)
        out, err = Stream(encoding, tty), Stream(encoding, tty)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    return use


COLOUR = re.compile(r"\x1b\[[\d;]*(3[0-7]|9[0-7]|38)m|\x1b\[[\d;]*31")


def test_in_a_pipe_tables_are_whole_and_plain(shell):
    out, _ = shell()
    tables.show(wide())
    lines = out.text().splitlines()
    assert lines[1].split() == ["blocks." * 30, "1.25", "G"] and "\x1b" not in out.text()
    assert not any(line.endswith("  ") for line in lines)


def test_at_a_terminal_tables_have_its_width_and_colours(shell):
    out, _ = shell(tty=True, COLUMNS="100")
    tables.show(wide())
    shown = re.sub(r"\x1b\[[\d;]*m", "", out.text()).splitlines()
    assert COLOUR.search(out.text()) and "…" in out.text() and {len(line) for line in shown} == {100}
    assert terminal.console(stderr=True).width == 100


def test_in_a_narrow_window_figures_are_not_cut(shell):
    out, _ = shell(tty=True, COLUMNS="30", NO_COLOR="1")
    tables.show(wide(9))
    assert "1.25 G" in out.text() and "…" not in out.text() and max(map(len, out.text().splitlines())) > 65
    assert terminal.console(stderr=True).width == 30  # bars fit the window


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}])
def test_no_color_and_dumb_terminals_are_honoured(variables, shell):
    out, _ = shell(tty=True, **variables)
    tables.show(wide())
    assert not COLOUR.search(out.text())


def test_force_color_colours_a_pipe_but_draws_no_bar(shell):
    out, err = shell(FORCE_COLOR="1")
    tables.show(wide())
    with Reporter() as reporter:
        reporter.update("eval", 1, 2)
        assert reporter.bar is None
    assert COLOUR.search(out.text()) and "\x1b" not in err.text()


@pytest.mark.parametrize(
    ("tty", "term", "bar"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_bars_are_for_terminals(tty, term, bar, shell):
    shell(tty=tty, TERM=term)
    with Reporter() as reporter:
        reporter.update("eval", 1, 2)
        assert (reporter.bar is not None) == bar


def test_an_ascii_stream_degrades_characters(shell):
    out, err = shell("ascii")
    terminal.prepare()
    tables.show(Text("– … 2 × ü"))
    print("→", file=err)
    assert (out.text(), err.text()) == ("- ... 2 x ?\n", "->\n")


def test_every_help_survives_ascii(shell):
    for name in COMMANDS:
        out, _ = shell("ascii")
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0 and out.text().startswith("Usage: sparsify")


@pytest.mark.parametrize("arguments", [["recipes"], ["--help"], ["--version"]])
def test_a_reader_that_has_gone_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sparsify", *arguments], stdout=writing, stderr=subprocess.PIPE, env=environment()
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_stdout_has_the_result_and_stderr_the_rest(run, tmp_path):
    code, out, err = run("convert", "digits", "--calib-images", 2, "--tail", "mean")
    assert code == 0 and out.splitlines()[-1].startswith("wrote model.safetensors") and "MHSA" in out
    assert "calibrating on" in err and "calibrating" not in out and "MHSA" not in err
    code, out, err = run("profile", "--no-measure", "--tree")
    assert code == 0 and not err and "\x1b" not in out and "blocks" in out
    code, out, err = run("models", "deit_s*")
    assert code == 0 and not err and all(names.resolve(line.split(" ")[0]) for line in out.splitlines())


# words from outside

HOSTILE = "\x1b]0;x\x07\x1b[2Ja\u202eb\udce9\r"
SHOWN = r"\x1b]0;x\x07\x1b[2Ja\u202eb\udce9\r"


def test_control_characters_are_shown_on_both_streams(shell):
    out, err = shell(tty=True)
    terminal.prepare()
    table = Table(HOSTILE)
    table.add_row(Text(HOSTILE))
    tables.show(table)
    terminal.line(HOSTILE)
    terminal.lines(f"{HOSTILE}\n\t{HOSTILE}\n")
    assert (
        out.text().count(SHOWN) == 3
        and out.text().count(SHOWN[:6]) == 5
        and "\x1b]" not in out.text()
        and "\x1b[2J" not in out.text()
    )
    options.say(False)(f"note: {HOSTILE}")
    with Reporter() as reporter:
        reporter.update(HOSTILE, 1, 2, HOSTILE)
        options.say(False)(HOSTILE)
    assert err.text().count(SHOWN) >= 2 and "\x1b]" not in err.text() and "\x1b[2J" not in err.text()


def test_errors_show_control_characters_in_python_too(run):
    for how in (str, SparsifyError.for_command_line):
        assert how(BadFile(f"no file {HOSTILE}\n")) == f"no file {SHOWN}\\n"
    for arguments in (["profile", HOSTILE], ["convert", HOSTILE], [HOSTILE], ["convert", "digits", f"--{HOSTILE}"]):
        code, _, err = run(*arguments)
        assert code in (1, 2) and "a\\u202eb" in the_error(err) and err.rstrip("\n").isprintable()


def test_nothing_is_printed_past_the_terminal():
    for path in sorted((HERE / "sparsify" / "cli").rglob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printed = [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
        assert path.name == "terminal.py" or not printed, path


@pytest.mark.parametrize(
    "path", ["a" * 4000, "a/" * 3000, "a\0b", "file/inside", "\udce9.safetensors", "locked/inside"]
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["profile", "{}"],
        ["eval", "{}", "--data", "digits"],
        ["show", "{}", "x.jpg"],
        ["report", "{}"],
        ["export", "{}"],
        ["convert", "{}"],
        ["convert", "digits", "--recipe", "{}"],
        ["convert", "digits", "--weights", "{}"],
        ["convert", "digits", "--data", "{}"],
        ["push", "{}", "a/b", "--dry-run"],
    ],
)
def test_a_path_that_the_system_refuses_is_one_line(run, tmp_path, path, arguments, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "locked").mkdir(mode=0)
    code, _, err = run(*(each.format(path) for each in arguments))
    assert code in (1, 2) and len(the_error(err)) < 1100
    assert "unexpected" not in err and "standard output" not in err


def test_closed_streams_are_no_error(tmp_path):
    shell = f"exec {sys.executable} -m sparsify"
    for closed, code in (("recipes >&-", 0), ("recipes show lost >&- 2>&-", 2), ("--version <&- >&- 2>&-", 0)):
        done = subprocess.run(["sh", "-c", f"{shell} {closed}"], capture_output=True, env=environment(), timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "wb") as full:
        how = [sys.executable, "-m", "sparsify", "recipes"]
        done = subprocess.run(how, stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=60, text=True)
    assert done.returncode == 1 and "No space left on device" in the_error(done.stderr)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "option", [["--batch-size", "9" * 30], ["--workers", "5000"], ["--seed", "9" * 400], ["--img-size", "99999"]]
)
def test_numbers_of_options_are_bounded(option, run):
    code, _, err = run("convert", "digits", *option)
    assert code == 2 and option[0] in the_error(err) and len(err) < 200


def test_too_little_memory_is_one_line(run, monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto allocate")):
        monkeypatch.setattr(building, "listing", lambda pattern, error=error: (_ for _ in ()).throw(error))
        assert run("models", "x") == (1, "", "error: there is not enough memory for this\n")


def test_a_reader_that_leaves_a_table_is_gone(monkeypatch):
    class Pipe(Stream):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Pipe())
    with pytest.raises(terminal.ReaderGone), terminal.read_to_the_end():
        tables.show(wide())
