"""Checkpoints in several files, which an index names: `*.index.json` with a `weight_map` from tensors to files."""

from __future__ import annotations

import re
from pathlib import Path

from sparsify.errors import BadFile, SparsifyError
from sparsify.files.plain_json import read_json
from sparsify.models.hub import CHECKPOINTS, WEIGHTS, fetch

INDEX = ".index.json"
FILES = (WEIGHTS, WEIGHTS + INDEX, "pytorch_model.bin", "pytorch_model.bin" + INDEX)
"""What a folder or repository may hold, as transformers and huggingface_hub name it; the first that is there is taken."""
_NAME = re.compile(r"\w[\w.-]*")


def is_index(path: Path) -> bool:
    return path.name.endswith(INDEX)


def only(folder: Path) -> bool:
    """Whether a folder has weights in shards and none in one file."""
    there = [(folder / name).is_file() for name in FILES]
    return any(there[1::2]) and not any(there[::2])


def of_index(path: Path) -> dict[str, list[str]]:
    """The names of tensors by the shard that has them, a file beside `path`.

    `BadFile`: unreadable, no index, or one that names other than files beside it.
    """
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BadFile(f"{path} is no index of a checkpoint: a weight_map from tensors to files is expected")
    shards: dict[str, list[str]] = {}
    for tensor, shard in names.items():
        if not isinstance(shard, str) or not _NAME.fullmatch(shard) or not shard.endswith(CHECKPOINTS):
            raise BadFile(f"{path}: the shard of {tensor} is not the name of a file of weights beside it")
        shards.setdefault(shard, []).append(tensor)
    return shards


def find(scheme: str, location: str) -> Path:
    """The weights, or their index, of a folder (`local-dir`) or a repository of the hub; shards are fetched with it.

    Raises:
        BadFile: there are none.
        SparsifyError: they cannot be downloaded.
    """
    if scheme == "local-dir":
        found = next((path for name in FILES if (path := Path(location) / name).is_file()), None)
        if found is None:
            raise BadFile(f"{location} has no weights: one of {', '.join(FILES)} is expected")
        return found
    refused: SparsifyError | None = None
    for name in FILES:
        try:
            found = fetch(location, name)
        except SparsifyError as error:
            refused = refused or error
            continue
        if is_index(found):
            for shard in of_index(found):
                fetch(location, shard)
        return found
    if isinstance(refused, BadFile):
        raise BadFile(f"hf-hub:{location} has no weights: one of {', '.join(FILES)} is expected")
    raise refused or BadFile(f"hf-hub:{location} has no weights")
