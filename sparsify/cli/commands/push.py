"""`sparsify push`: a converted file into a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import options
from sparsify.cli.preflight import preflight
from sparsify.errors import UsageError


def push(
    file: options.Model,
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made where there is none.", show_default="main")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default="names sparsify's version")] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", metavar="JSON", help="Results for the card, of 'eval --results-file NAME.json'."),
    ] = None,
    timing: Annotated[
        Path | None, typer.Option("--profile", metavar="JSON", help="Times for the card, of 'profile --json'.")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence", "--license", help="Of the weights, if you know it better.", show_default="the file's"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Write the files to FOLDER and send nothing."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card and send nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another model.")] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Put a converted file on the hub, with its model card.

    The token is huggingface_hub's: HF_TOKEN, or what 'hf auth login' stored.

    Example: sparsify push model.safetensors ORG/NAME --eval results.json
    """
    if dry_run and output is not None:
        raise UsageError("--dry-run shows the card, --output FOLDER writes it: give one of them")
    preflight()
    from sparsify.jobs import push as publishing

    say = options.say(quiet)
    made = publishing.package(file, repo, evaluation, timing, licence)
    for note in made.notes:
        say(f"note: {note}")
    if dry_run:
        print(made.card, end="")
        return
    if output is not None:
        publishing.write(made, output, force)
        print(f"wrote model.safetensors, config.json and README.md in {output}; nothing was sent")
        return
    if quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    done = publishing.push(made, private, revision, message, force, say)
    print(f"pushed to {done.url}, commit {done.commit[:8]}; sparsify.load({done.name!r}) loads it")
