"""What a file of weights is by its first bytes, whatever its name says."""

from __future__ import annotations

from pathlib import Path

from sparsify.errors import BadFile, one_line
from sparsify.files.plain_json import from_json

SAFETENSORS, TORCH = "safetensors", "torch"
_TORCH = (b"PK\x03\x04", b"\x80\x02\x8a")  # its archive, and its older form
_LONGEST_HEADER = 100_000_000  # bytes, by safetensors
_PAGE = "a web page, not weights: download the file itself (on the hub 'resolve' instead of 'blob' in its address)"
_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for: 'git lfs pull' fetches that"),
    *((tag, _PAGE) for tag in (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML", b"<?xml")),
    (b"\x89HDF", "an HDF5 file (Keras): weights for PyTorch are expected, .safetensors or .pth"),
    (b"\x93NUMPY", "an array of NumPy: a state dict is expected, .safetensors or .pth"),
    (b"GGUF", "a GGUF file: weights for PyTorch are expected, .safetensors or .pth"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
)
_JSON = "JSON, not weights: give the file of the weights"
_SHARDS = "the index of a checkpoint in several files: 'sparsify convert' takes it, named *.index.json, with its files"


def of(path: Path) -> str:
    """`SAFETENSORS`, `TORCH`, or '' for what begins like neither.

    Raises:
        BadFile: another kind of file that is known (a web page, a Git LFS pointer, the index of shards, ...), an empty one,
            or one that cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {one_line(error)}") from None
    if not start:
        raise BadFile(f"{path} is empty: fetch or write it again")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER:
        return SAFETENSORS
    if start.startswith(_TORCH):
        return TORCH
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    for beginning, what in _FOREIGN:
        if text.startswith(beginning):
            raise BadFile(f"{path} is {what}")
    if text.startswith(b"{"):
        raise BadFile(f"{path} is {_SHARDS if _is_index(path) else _JSON}")
    return ""


def _is_index(path: Path) -> bool:
    try:
        return "weight_map" in from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
