"""`sparsify push`: a converted file into a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from sparsify.cli import options, terminal
from sparsify.cli.options import argument, flag, option
from sparsify.cli.preflight import preflight
from sparsify.errors import UsageError

RESULTS = "Results for the card, written by 'eval --results-file NAME.json'."
TIMES = "Times for the card, written by 'profile --json'."
LICENCE = "Licence of the weights, instead of the file's."
FOLDER = "Write the files to FOLDER and send nothing."


def push(
    file: options.Model,
    repo: Annotated[str, argument("ORG/NAME", "Repository; created if it does not exist.")],
    private: Annotated[bool, flag("--private", "Make a new repository private.")] = False,
    revision: Annotated[str | None, option("BRANCH", "Branch; created if it does not exist.", default="main")] = None,
    message: Annotated[str | None, option("TEXT", "Commit message.", default="names sparsify's version")] = None,
    evaluation: Annotated[Path | None, option("JSON", RESULTS, names="--eval")] = None,
    timing: Annotated[Path | None, option("JSON", TIMES, names="--profile")] = None,
    licence: Annotated[str | None, option("NAME", LICENCE, None, "the file's", names="--licence --license")] = None,
    output: Annotated[Path | None, option("FOLDER", FOLDER, names="--output -o")] = None,
    dry_run: Annotated[bool, flag("--dry-run", "Show the card and send nothing.")] = False,
    force: Annotated[bool, flag("--force", "Replace another model.")] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Publish a converted file on the Hugging Face Hub, with a model card.

    Uses huggingface_hub's token: HF_TOKEN, or the one that 'hf auth login' stored.

    Example: sparsify push model.safetensors ORG/NAME --eval results.json
    """
    if dry_run and output is not None:
        raise UsageError("--dry-run shows the card, --output FOLDER writes it: give one of them")
    if output is not None:
        from sparsify.files.destinations import check_folder

        check_folder(output)
    preflight()
    from sparsify.jobs import push

    say = options.say(quiet)
    made = push.package(file, repo, evaluation, timing, licence)
    for note in made.notes:
        say(f"note: {note}")
    if dry_run:
        terminal.lines(made.card)
        return
    if output is not None:
        push.write(made, output, force)
        terminal.line(f"wrote model.safetensors, config.json and README.md in {output}; nothing was sent")
        return
    if quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    done = push.push(made, private, revision, message, force, say)
    terminal.line(f"pushed to {done.url}, commit {done.commit[:8]}; sparsify.load({done.name!r}) loads it")
