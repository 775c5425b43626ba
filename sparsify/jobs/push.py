"""The job behind `sparsify push`: a converted file and its model card into a repository of the hub, or into a folder.

Everything is read, verified and described before anything is sent. One commit holds all files.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import BadFile, SparsifyError, UsageError, field, one_line
from sparsify.files.outputs import whole, write_all
from sparsify.files.plain_json import from_json, to_json
from sparsify.measure.profile import profile
from sparsify.models import checkpoint, hub, provenance
from sparsify.models.hub import ARCHITECTURE
from sparsify.models.licence import licence_of
from sparsify.nn import graft
from sparsify.reports import readback
from sparsify.reports.card import Facts, card
from sparsify.version import __version__

_LOCAL = re.compile(r"(?<![\w/.])(?:/[\w.+-]+){2,}|[A-Za-z]:\\\\\\\\[\w.+-]+|~/[\w./-]+")  # a path, in JSON
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".onnx", ".h5", ".msgpack", ".gguf")


@dataclass(frozen=True)
class Package:
    """What a repository will hold."""

    repo: str  # ORG/NAME
    file: Path  # the converted file, which becomes model.safetensors
    config: str  # text of config.json
    card: str  # text of README.md
    notes: tuple[str, ...] = ()  # for the person who pushes


@dataclass(frozen=True)
class Pushed:
    """What `push` made."""

    url: str  # of the repository; '' where nothing was sent
    commit: str
    name: str  # that `load` takes
    package: Package


def package(
    file: Path, repo: str, evaluation: Path | None = None, timing: Path | None = None, licence: str | None = None
) -> Package:
    """Reads and verifies `file` and describes it.

    Args:
        evaluation: results of `sparsify eval` of this very file, JSON; timing: figures of `sparsify profile --json`.
        licence: of the weights, where their owner says it; None: what the file says.

    Raises:
        UsageError: `repo` is not ORG/NAME.
        BadFile: a file that is no converted model, or figures that are not this model's.
    """
    name, revision = hub.split(repo)
    if revision:
        raise UsageError(f"{repo}: give the revision with {field('revision')}")
    one = checkpoint.read(file)
    header, digest = one.header, one.digest
    figures = profile(one.model, dense=graft.dense_twin(one.model), measure=False)
    known = licence_of(header, licence)
    results = None if evaluation is None else readback.results(evaluation, digest, header)
    measured = None if timing is None else readback.times(timing, figures.macs_sparse, figures.param_count)
    facts = Facts(name, header, figures, known, provenance.origin(header), results, measured)
    notes = [known.note] if known.note else []
    if local := _LOCAL.search(json.dumps(header.provenance)):
        what = f"names a folder of this machine ({local[0]})"
        notes.append(f"the file's header {what}: whoever downloads it can read that")
    return Package(name, file, _config(header, digest, known.name), card(facts), tuple(notes))


def write(made: Package, folder: Path, force: bool = False) -> None:
    """Writes the three files into `folder`, which timm reads as local-dir: (after `import sparsify.registry`).

    Raises:
        BadFile: such files exist there already, or the folder cannot be written.
    """
    existing = [name for name in (hub.WEIGHTS, hub.CONFIG, hub.CARD) if (folder / name).exists()]
    if existing and not force:
        names, option = ", ".join(existing), field("force")
        raise BadFile(f"{folder} has {names} already: choose another folder, or overwrite with {option}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadFile(f"cannot make the folder {folder}: {one_line(error)}") from None
    if not (folder / hub.WEIGHTS).exists() or not (folder / hub.WEIGHTS).samefile(made.file):
        with whole(folder / hub.WEIGHTS) as temporary:
            shutil.copyfile(made.file, temporary)
    write_all({folder / hub.CONFIG: made.config, folder / hub.CARD: made.card})


def push(
    made: Package,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Creates the repository if there is none, and sends the three files in one commit.

    The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` stored. It is neither shown nor written.

    Args:
        private: create a private repository; an existing one must be private already.
        revision: branch, created if there is none; None: main.
        force: also replace another model.

    Raises:
        SparsifyError: no token, no network, no right to write, another model there: one line each; nothing was sent then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    token = get_token()
    if not token:
        raise SparsifyError("not logged in to the hub: run 'hf auth login', or set HF_TOKEN to a token that may write")
    message = message or f"Sparse model by sparsify {__version__}"
    api = HfApi(library_name="sparsify", library_version=__version__, token=token)
    operations = [
        CommitOperationAdd(hub.WEIGHTS, str(made.file)),
        CommitOperationAdd(hub.CONFIG, made.config.encode()),
        CommitOperationAdd(hub.CARD, made.card.encode()),
    ]
    try:
        with hub.quick_hub():
            _may_push(api, made, private, revision, force)
            url = api.create_repo(made.repo, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(made.repo, branch=revision, exist_ok=True)
            say(f"sending {made.file.stat().st_size / 1e6:.1f} MB to {url}")
            commit = api.create_commit(made.repo, operations, commit_message=message, revision=revision)
    except SparsifyError:
        raise
    except Exception as error:
        raise _push_error(made.repo, error, token) from None
    return Pushed(str(url), str(commit.oid), f"hf-hub:{made.repo}" + (f"@{revision}" if revision else ""), made)


def _may_push(api: Any, made: Package, private: bool, revision: str | None, force: bool) -> None:
    """Raise if the repository is public although `private` is asked for, or holds another model."""
    from huggingface_hub import errors

    try:
        info = api.model_info(made.repo)
    except errors.RepositoryNotFoundError:
        return
    if private and not info.private:
        raise SparsifyError(
            f"{made.repo} exists and is public: make it private on its page first, or leave {field('private')} out"
        )
    try:
        files = api.list_repo_files(made.repo, revision=revision)
    except errors.RevisionNotFoundError:
        files = api.list_repo_files(made.repo)  # a new branch starts from main
        revision = None
    if force or not any(name == hub.CONFIG or name.endswith(WEIGHT_SUFFIXES) for name in files):
        return
    there = _described(made.repo, revision) if hub.CONFIG in files else None
    if there is None or there != _identity(json.loads(made.config)):
        what = "a file that 'sparsify push' did not write" if there is None else f"a sparse {there[0]}"
        replaced = f"replace it with {field('force')}"
        raise SparsifyError(f"{made.repo} holds another model ({what}): choose another name, or {replaced}")


def _described(repo: str, revision: str | None) -> tuple[str, int] | None:
    file = hub.fetch(repo + (f"@{revision}" if revision else ""), hub.CONFIG)
    try:
        return _identity(from_json(file.read_text(encoding="utf-8")))
    except ValueError:
        return None


def _identity(config: Any) -> tuple[str, int] | None:
    """Converted architecture and number of classes in a config.json; None: sparsify did not write it."""
    if not isinstance(config, dict) or config.get("architecture") != ARCHITECTURE:
        return None
    own = config.get("sparsify")
    return (str(own.get("architecture")), int(config.get("num_classes") or 0)) if isinstance(own, dict) else None


def _push_error(repo: str, error: Exception, token: str) -> SparsifyError:
    from huggingface_hub import errors

    reason = one_line(error, 160).replace(token, "***")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"'{repo}' cannot be the name of a model on the hub: {reason}")
    if status == 401:
        return SparsifyError(
            f"the hub does not accept the token: log in again ('hf auth login', or HF_TOKEN); {repo} is as it was"
        )
    if status == 403:
        return SparsifyError(f"this token may not write to {repo}: it needs the right to, in that organisation too")
    kinds = {kind.__name__ for kind in type(error).__mro__}  # of httpx or requests, by huggingface_hub's version
    if status is None and kinds & {"OSError", "TransportError", "RequestException"}:
        return SparsifyError(f"no connection to the hub, {repo} is as it was ({type(error).__name__}: {reason})")
    return SparsifyError(f"{repo} could not be written ({type(error).__name__}: {reason})")


def _config(header: checkpoint.Header, digest: str, licence: str) -> str:
    """config.json in timm's form, of an architecture that only `sparsify.registry` knows."""
    classes = int(header.architecture["model_args"].get("num_classes") or 0)
    own = {k: v for k, v in header.architecture["pretrained_cfg"].items() if k not in ("architecture", "license")}
    if licence:
        own["license"] = licence
    tree = {
        "architecture": ARCHITECTURE,
        "num_classes": classes,
        "pretrained_cfg": own,
        "sparsify": {
            "architecture": header.architecture["architecture"],
            "format": checkpoint.FORMAT,
            "config": header.config.model_dump(mode="json"),
            "sha256": digest,
        },
    }
    return to_json(tree, indent=2) + "\n"
