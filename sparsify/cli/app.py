"""The command line: each of `commands/` parses, calls one job and renders its result. torch is imported inside them only.

Exit codes: 0 done; 1 a bad file, data set or model; 2 a bad option, argument or name; 130 interrupted; 141 the output
pipe was closed. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from sparsify import processes
from sparsify.cli import terminal
from sparsify.cli.commands.convert import convert
from sparsify.cli.commands.doctor import doctor
from sparsify.cli.commands.evaluate import evaluate
from sparsify.cli.commands.export import export
from sparsify.cli.commands.kernels import build_kernels
from sparsify.cli.commands.models import models
from sparsify.cli.commands.predict import predict
from sparsify.cli.commands.profile import profile
from sparsify.cli.commands.push import push
from sparsify.cli.commands.recipes import recipes
from sparsify.cli.commands.report import report
from sparsify.cli.commands.show import show
from sparsify.cli.commands.sweep import sweep
from sparsify.cli.helptext import App
from sparsify.errors import SparsifyError, one_line, short

INTERRUPTED = 130
READER_GONE = 141  # as shells report a program ended by SIGPIPE

app = App(
    name="sparsify",
    help="Pretrained timm Vision Transformers with per-image sparse attention (Sparsifiner, CVPR 2023).",
    epilog=(
        "'sparsify COMMAND --help' shows the options of a command. Results go to stdout; notes, progress and errors go to "
        "stderr.\n\n\b\nExit codes:\n  0    done\n  1    a bad file, data set or model\n"
        "  2    a bad option, argument or name\n  130  interrupted\n  141  the output pipe was closed (| head)"
    ),
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from sparsify.cli import machine

        for line in machine.versions():
            terminal.line(line)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print versions and kernels, then exit."),
    ] = False,
) -> None:
    """Options of every command follow the command."""


for command in (
    convert,
    profile,
    evaluate,
    predict,
    sweep,
    show,
    report,
    push,
    export,
    models,
    recipes,
    build_kernels,
    doctor,
):
    app.command("eval" if command is evaluate else None)(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: an expected error is an exit code and one line on stderr, printed by one process of several."""
    given = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in given
    terminal.prepare()
    warnings.filterwarnings("ignore", message="sparse attention is computed by")  # the commands say it themselves
    command = typer.main.get_command(app)
    try:
        with terminal.read_to_the_end():
            code = command.main(args=given, prog_name="sparsify", standalone_mode=False)
    except SparsifyError as error:
        if processes.main() or not processes.agreed(error):  # otherwise another process prints it
            _fail(error.for_command_line(), error.exit_code, debug)
        raise SystemExit(error.exit_code) from None
    except typer.TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        code = _fail(message, 2, False) if processes.main() else 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except terminal.ReaderGone:
        code = READER_GONE
    except OSError as error:  # a path that the system refuses, a full disk
        named = f": {error.filename}" if error.filename else ""
        code = _fail(f"{error.strerror or one_line(error)}{named}", 1, debug)
    except Exception as error:
        code = _fail(_outside(error) or f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1, debug)
    if code == INTERRUPTED and processes.main():  # typer turns Ctrl-C into this code
        _fail("interrupted; nothing half-written is left", INTERRUPTED, False)
    raise SystemExit(code if isinstance(code, int) else 0)


def _outside(error: Exception) -> str:
    """What of the machine or of a path stopped the command; '' where that is no reason."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return "there is not enough memory for this"
    return "a path has a null byte: no file can be named so" if "null byte" in str(error) else ""


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        for row in traceback.format_exc().splitlines():
            terminal.note(row)
    terminal.note(f"error: {short(' '.join(message.split()))}")
    return code
