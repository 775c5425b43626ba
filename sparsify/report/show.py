"""The files of `sparsify show`: PNGs for each image, all drawn before the first is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sparsify.errors import BadFile, one_line
from sparsify.files import whole
from sparsify.jobs.show import Shown
from sparsify.report import figures


def draw(shown: Sequence[Shown], progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, bytes]:
    """File names and PNGs: NAME.keys-1.png and so on for the queries, NAME.tokens.png where tokens leave, NAME.mass.png."""
    made: dict[str, bytes] = {}
    for i, each in enumerate(shown):
        progress(i, len(shown))
        for query in range(len(each.found.queries)):
            made[f"{each.name}.keys-{query + 1}.png"] = figures.keys(each, query)
        if each.found.stages:
            made[f"{each.name}.tokens.png"] = figures.tokens(each)
        made[f"{each.name}.mass.png"] = figures.mass(each)
    progress(len(shown), len(shown))
    return made


def can_write(folder: Path) -> None:
    """Raise where `write` is going to fail, before anything is computed.

    Raises:
        BadFile: a file lies there, or the folder that it is to be made in is missing.
    """
    if folder.exists() and not folder.is_dir():
        raise BadFile(f"cannot write to {folder}: it is a file, a folder is expected")
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise BadFile(f"cannot make {folder}: there is no folder {folder.absolute().parent}")


def write(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write them, each whole or not at all; the folder is made where there is none. Other files stay.

    Raises:
        BadFile: they cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise BadFile(f"cannot make {folder}: {one_line(error)}") from error
    for name, content in files.items():
        with whole(folder / name) as temporary:
            Path(temporary).write_bytes(content)
    return [folder / name for name in files]
