"""The dense model that a file was made from, when its own weights no longer are that model's (fine-tuned files)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from sparsify.errors import BadFile
from sparsify.models import building, checkpoint, names, pretrained
from sparsify.nn.graft import _classes

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def load_original(
    header: checkpoint.Header,
    asked: str | Path,
    img_size: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """The dense model `asked` on the CPU, float32, eval mode, if it is the one that the file of `header` was made from.

    Args:
        asked: a name (`zoo.resolve`), or a checkpoint (.safetensors, .pth) of the file's architecture.
        img_size: side in pixels, when it is not the file's; position embeddings are resampled after the comparison.
        say: called with a line where the file is too old to tell which model it was made from.

    Raises:
        BadFile: another model, or a file that cannot be read, is no checkpoint or was written by `convert`.
        UsageError: an unknown name, or an image size that the architecture cannot take.
        SparsifyError: weights that cannot be downloaded.
    """
    asked = str(asked)
    file = Path(asked)
    is_file = file.suffix in SUFFIXES or file.is_file()
    model = _of_file(header, file) if is_file else _of_name(header, asked)
    if not header.dense_sha256:
        say(f"--dense {asked} has the right architecture; whether it is the original, this file does not say")
    elif checkpoint.digest_of(model) != header.dense_sha256:
        raise BadFile(_not_it(header, asked, "its weights differ"))
    if img_size is not None:
        checkpoint.resize(model, img_size)
    return model


def missing(header: checkpoint.Header) -> str:
    """One line: why there are no dense figures of a file whose backbone changed, and what to give."""
    known = header.provenance.get("backbone_changed") is True
    why = "this file's weights were fine-tuned" if known else "this file does not say that its weights are unchanged"
    return f"no dense figures: {why}; {_hint(header)} compares with the original"


def _of_name(header: checkpoint.Header, asked: str) -> nn.Module:
    source = names.resolve(asked)
    wanted, classes = header.architecture["architecture"], _argument(header, "num_classes")
    if source.architecture != wanted:
        raise BadFile(_not_it(header, asked, f"it is a {source.architecture}, the file a {wanted}"))
    own = _classes(building.skeleton(source))
    if classes not in (None, 0, own):
        raise BadFile(_not_it(header, asked, f"it has {own} classes, the file {classes}"))
    return pretrained.load(source, None, classes, _side(header))


def _of_file(header: checkpoint.Header, file: Path) -> nn.Module:
    if file.suffix == ".safetensors" and file.is_file() and _converted(file):
        raise BadFile(f"--dense {file}: a model that 'sparsify convert' wrote, not a dense one; give {_hint(header)}")
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in header.architecture["model_args"].items()}
    architecture = header.architecture["architecture"]
    source = names.Source(architecture, architecture, architecture, args)
    return pretrained.load(source, file, _argument(header, "num_classes"), _side(header))


def _converted(file: Path) -> bool:
    try:
        checkpoint.read_header(file)
    except BadFile:
        return False
    return True


def _side(header: checkpoint.Header) -> int | None:
    """Pixels of a square image; None: what the weights have."""
    size = _argument(header, "img_size")
    sides = set(size) if isinstance(size, list | tuple) else {size}
    return sides.pop() if len(sides) == 1 else None


def _argument(header: checkpoint.Header, name: str) -> Any:
    return header.architecture["model_args"].get(name)


def _not_it(header: checkpoint.Header, asked: str, why: str) -> str:
    return f"--dense {asked} is not the model that this file was made from ({why}); give {_hint(header)}"


def _hint(header: checkpoint.Header) -> str:
    """The option that names the original, as far as the file tells."""
    source, weights = header.provenance.get("source"), header.provenance.get("weights")
    if weights:
        return f"--dense FILE with {weights}, the checkpoint that was converted,"
    return f"--dense {source or 'NAME|FILE'}"
