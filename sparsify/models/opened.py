"""A converted file with the dense original that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sparsify.models import checkpoint
from sparsify.models.checkpoint import Header
from sparsify.models.original import load_original, missing


@dataclass(frozen=True)
class Opened:
    """Both models, float32, eval mode, on the CPU.

    Attributes:
        model: the sparse model.
        dense: the original that was asked for; None: the model's own weights without sparsity stand in, unless
            `backbone_changed`.
        header: what the file says of itself.
    """

    model: nn.Module
    dense: nn.Module | None
    header: Header

    @property
    def backbone_changed(self) -> bool:
        """Whether the file's weights differ, or may differ, from those of its dense original."""
        return self.header.backbone_changed

    @property
    def note(self) -> str:
        """One line for people where there are no dense figures: why, and what gives them; else ''."""
        return missing(self.header) if self.backbone_changed and self.dense is None else ""


def opened(
    file: Path,
    dense: nn.Module | str | Path | None = None,
    img_size: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Opened:
    """Reads a file that `convert` wrote, and its dense original where one is asked for.

    Args:
        dense: a model, which is taken as it is; a name or checkpoint (`load_original`), held against the file; or None.
        img_size: side in pixels, of both models; None: the file's own.
        say: called with a line where the file is too old to tell which model it was made from.

    Raises:
        SparsifyError: see `sparsify.models.checkpoint.load` and `load_original`.
    """
    header, model = checkpoint.read_header(file), checkpoint.load(file, img_size)
    if dense is None or isinstance(dense, nn.Module):
        return Opened(model, dense, header)
    return Opened(model, load_original(header, dense, img_size, say), header)
