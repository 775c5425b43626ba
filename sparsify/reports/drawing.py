"""What all plots share: colours, figure, title, PNG."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from sparsify import extras

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.35"  # Okabe and Ito: distinct without colour vision
PURPLE = "#CC79A7"  # of the same palette


def figure(width: float, height: float, dpi: int = 160, **options: Any) -> Any:
    """A figure of matplotlib, inches, that needs no display; options as matplotlib's.

    Raises `SparsifyError` where matplotlib is not installed.
    """
    extras.need("a plot", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=dpi, **options)
    FigureCanvasAgg(made)
    return made


def title(figure: Any, text: str) -> None:
    """A line at the top left, cut to the width."""
    width, height = figure.get_size_inches()
    room = int(width * 13)
    text = text if len(text) <= room else f"{text[: room - 1]}…"
    figure.text(0.15 / width, 1 - 0.14 / height, text, fontsize=11.5, va="top", parse_math=False)


def tidy(axes: Any) -> None:
    """Small tick labels, no frame above and to the right."""
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Any) -> bytes:
    """The file's content."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
