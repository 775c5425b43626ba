"""What all plots share: colours, figure, PNG."""

from __future__ import annotations

from io import BytesIO
from typing import Any

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.35"  # Okabe and Ito: told apart without colour vision


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Any, text: str) -> None:
    width, height = figure.get_size_inches()
    room = int(width * 13)
    text = text if len(text) <= room else f"{text[: room - 1]}…"
    figure.text(0.15 / width, 1 - 0.14 / height, text, fontsize=11.5, va="top", parse_math=False)


def _png(figure: Any) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
