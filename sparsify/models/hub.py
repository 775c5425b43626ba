"""Sparse models on the hub: their names, and downloads that fail at once and in one line without network.

    hf-hub:ORG/NAME    model.safetensors of that repository, as `sparsify push` puts it there; @REVISION may follow
    ORG/NAME           the same, unless there is a local file of that name
    local-dir:FOLDER   FOLDER/model.safetensors

Downloads go through huggingface_hub and stay in its cache; without network only the cache is read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from sparsify.errors import BadFile, SparsifyError, UsageError, one_line

ARCHITECTURE = "sparsify_vit"  # of a sparse model, in the config.json of its repository
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
SCHEMES = ("hf-hub:", "hf_hub:")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")  # endings of files with weights


def local(name: str | Path) -> Path:
    """The local file that `name` stands for: the path itself, or what `fetch` downloads from the hub."""
    text = str(name)
    if text.startswith("local-dir:"):
        return Path(text.removeprefix("local-dir:")) / WEIGHTS
    if text.startswith(SCHEMES):
        return fetch(text.partition(":")[2])
    on_hub = isinstance(name, str) and is_name(text) and not text.endswith((*CHECKPOINTS, ".json", ".yaml"))
    return fetch(text) if on_hub and not os.path.exists(name) else Path(name)


def is_name(name: str) -> bool:
    """Whether `name` has the form ORG/NAME or ORG/NAME@REVISION."""
    return bool(_NAME.fullmatch(name))


def split(name: str) -> tuple[str, str | None]:
    """'ORG/NAME@REVISION' -> ('ORG/NAME', 'REVISION'), 'ORG/NAME' -> ('ORG/NAME', None); else `UsageError`."""
    if not is_name(name):
        raise UsageError(f"'{name}' is no name of a model on the hub: ORG/NAME is expected, or ORG/NAME@REVISION")
    repository, _, revision = name.partition("@")
    return repository, revision or None


def fetch(name: str, filename: str = WEIGHTS, cache_dir: str | Path | None = None) -> Path:
    """`filename` of the repository ORG/NAME[@REVISION] in huggingface_hub's cache, downloaded if it is not there yet.

    `cache_dir` replaces huggingface_hub's own cache (HF_HUB_CACHE).

    Raises:
        UsageError: not a valid name of the hub.
        BadFile: the repository has no such file, or there is no such revision.
        SparsifyError: no such repository, no access to it, no network, or a download that failed.
    """
    repository, revision = split(name)
    from huggingface_hub import hf_hub_download

    try:
        with quick_hub():
            return Path(hf_hub_download(repository, filename, revision=revision, cache_dir=cache_dir))
    except Exception as error:
        raise _download_error(name, filename, error) from error


def _download_error(name: str, filename: str, error: Exception) -> SparsifyError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return SparsifyError(f"hf-hub:{name} asks for its terms to be accepted first: do so on its page, and log in")
    if isinstance(error, errors.RevisionNotFoundError):
        return BadFile(f"hf-hub:{name}: the hub has no such revision of this model")
    if isinstance(error, errors.RepositoryNotFoundError):
        advice = "check the name, or log in ('hf auth login', or HF_TOKEN)"
        return SparsifyError(f"the hub has no model {name}, or it is private: {advice}")
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = (
            f"no connection to the hub, and {filename} is not in its cache here; give a file, or try again with network"
        )
        return SparsifyError(f"hf-hub:{name} could not be downloaded: {why}")
    if isinstance(error, errors.EntryNotFoundError):
        return BadFile(f"hf-hub:{name} has no {filename}: it is no model that 'sparsify push' put there")
    return SparsifyError(f"hf-hub:{name} could not be downloaded ({type(error).__name__}: {one_line(error, 120)})")


@contextlib.contextmanager
def quick_hub() -> Iterator[None]:
    """Without name service the hub client would retry for 50 s and write 20 lines: inside, it then reads its cache only."""
    import huggingface_hub.constants as constants

    log, before = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    level = log.level
    log.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = before or not reachable(str(constants.ENDPOINT))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        log.setLevel(level)


def reachable(url: str) -> bool:
    """Whether the host of `url` can be resolved, or a proxy is configured that would."""
    if urllib.request.getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None))
    except OSError:
        return False
