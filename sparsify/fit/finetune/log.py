"""What a run of fine-tuning writes while it runs: two CSV files, TensorBoard's events, and at its end a picture."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sparsify.errors import BadFile, one_line
from sparsify.files import write_text

Value = float | int | str | None

PARTS = ("classification", "logits", "tokens", "features", "attention", "mass", "basis_l1")
"""Parts of the loss, as weighted in it."""
METRICS = ("step", "stage", "epoch", "lr", "loss", *PARTS, "images_per_s")
SCORES = ("agreement", "kl", "top1")
VALIDATION = ("step", "stage", "epoch", *SCORES, "images", "weights", "best")

WHOLE = ("step", "stage", "images", "best")  # columns of whole numbers


class Record:
    """Writes FOLDER/metrics.csv, validation.csv, tensorboard/ and, when closed, curve.png. Use as a context manager.

    A row of metrics is with the operating system when `step` returns, and on the disk after `flush`; validation.csv is
    always whole. TensorBoard or a picture that fails costs one line, never the run.

    Args:
        folder: of the run; made where it is missing.
        stages: their names.
        resume_step: optimiser steps that are done and kept: rows of later ones are cut. None: a new run, whose rows take
            the place of those of an older one.
        say: called with lines for the person at the terminal.

    Raises:
        BadFile: the files cannot be written, or are not a run's.
    """

    def __init__(
        self,
        folder: Path,
        stages: Sequence[str],
        resume_step: int | None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.stages, self.say = folder, tuple(stages), say
        self.metrics, self.validations = folder / "metrics.csv", folder / "validation.csv"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _cut(self.metrics, METRICS, resume_step)
            _cut(self.validations, VALIDATION, resume_step)
            self.rows = _raw(self.validations, VALIDATION)
            self.file: io.TextIOWrapper | None = open(  # noqa: SIM115
                self.metrics, "a", buffering=1, encoding="utf-8", newline=""
            )
        except OSError as error:
            raise BadFile(f"cannot write {self.metrics}: {one_line(error)}") from error
        self.writer = csv.DictWriter(self.file, METRICS, lineterminator="\n")
        self.board = self._board(resume_step)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def step(self, row: Mapping[str, Value]) -> None:
        """A row for an optimiser step: any of `METRICS`, `step` (from 1) and `stage` (from 0) always.

        Raises:
            BadFile: it cannot be written.
        """
        try:
            self.writer.writerow(_cells(row))
        except OSError as error:
            raise BadFile(f"cannot write {self.metrics}: {one_line(error)}") from error
        scalars = {"loss/total": row.get("loss"), "lr": row.get("lr"), "images_per_s": row.get("images_per_s")}
        self._show(row, scalars | {f"loss/{name}": row.get(name) for name in PARTS})

    def validation(self, row: Mapping[str, Value]) -> None:
        """A row for a validation: any of `VALIDATION`, `step`, `stage` and `weights` (current, ema, start) always.

        A row of the same three takes the place of the earlier one: a resumed run may validate once more.

        Raises:
            BadFile: it cannot be written.
        """
        cells = dict.fromkeys(VALIDATION, "") | _cells(row)
        self.rows = [r for r in self.rows if any(r[name] != cells[name] for name in ("step", "stage", "weights"))]
        self.rows.append(cells)
        _write(self.validations, VALIDATION, self.rows)
        ending = "_ema" if row.get("weights") == "ema" else ""
        self._show(row, {f"validation/{name}{ending}": row.get(name) for name in SCORES})

    def flush(self) -> None:
        """All rows so far are on the disk: call it before the state that they belong to is saved.

        Raises:
            BadFile: they cannot be written.
        """
        if self.file is None:
            return
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise BadFile(f"cannot write {self.metrics}: {one_line(error)}") from error
        self._tell("flush")

    def close(self) -> None:
        """Close the files and draw FOLDER/curve.png; a second call does nothing."""
        if self.file is None:
            return
        try:
            self.flush()
        finally:
            file, self.file = self.file, None
            with contextlib.suppress(OSError):  # `flush` has raised it
                file.close()
            self._tell("close")
        try:
            from sparsify.report import training_plot

            rows = read(self.metrics), read(self.validations)
            training_plot.draw(*rows, self.folder / "curve.png", self.stages)
        except Exception as error:  # the figures are there without it
            self.say(f"no picture was drawn ({one_line(error)})")

    def _board(self, resume_step: int | None) -> Any:
        """TensorBoard's writer, or None where there is none."""
        place = self.folder / "tensorboard"
        try:
            from torch.utils.tensorboard import SummaryWriter

            if resume_step is None:
                for old in place.glob("events.out.tfevents.*"):  # two runs in one folder are drawn as one
                    old.unlink()
            purge = None if resume_step is None else resume_step + 1
            return SummaryWriter(str(place), purge_step=purge, flush_secs=20)  # type: ignore[no-untyped-call]
        except Exception as error:
            self._lost(error)
        return None

    def _show(self, row: Mapping[str, Value], scalars: Mapping[str, Value]) -> None:
        for name, value in scalars.items():
            if value is not None and value != "":
                self._tell("add_scalar", name, float(value), int(row["step"] or 0))

    def _tell(self, method: str, *arguments: Any) -> None:
        """Call TensorBoard's writer; an error ends it, not the run."""
        try:
            if self.board is not None:
                getattr(self.board, method)(*arguments)
        except Exception as error:
            self.board = None
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        self.say(f"nothing is written for TensorBoard ({one_line(error)}); the CSV files have it all")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.csv or validation.csv as numbers, exact; None where a cell is empty. No file: no rows.

    Raises:
        BadFile: it is not one of these files.
    """
    columns = VALIDATION if path.name.startswith("validation") else METRICS
    try:
        return [{name: _value(name, cell) for name, cell in row.items()} for row in _raw(path, columns)]
    except (OSError, ValueError) as error:
        raise BadFile(f"cannot read {path}: {one_line(error)}") from error


def _raw(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows as they were written; a last one that was cut short by a crash is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    if text and (not rows or rows[0] != list(columns)):
        raise BadFile(f"{path} has other columns than a run writes: move it away or choose another folder")
    for number, cells in enumerate(rows[1:], 2):
        if len(cells) != len(columns) or not cells[0].isdigit():
            raise BadFile(f"{path}, line {number} is damaged: move it away or choose another folder")
    return [dict(zip(columns, cells, strict=True)) for cells in rows[1:]]


def _cut(path: Path, columns: Sequence[str], last: int | None) -> None:
    """Leave the header and the rows up to step `last`; None: the header."""
    rows = [] if last is None else _raw(path, columns)
    _write(path, columns, [row for row in rows if int(row["step"]) <= (last or 0)])


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _cells(row: Mapping[str, Value]) -> dict[str, str]:
    return {name: _cell(value) for name, value in row.items()}


def _cell(value: Value) -> str:
    """Text from which `float` makes the same number to the bit."""
    if value is None or isinstance(value, str):
        return value or ""
    return str(int(value)) if isinstance(value, int) else repr(float(value))


def _value(name: str, cell: str) -> Any:
    if cell == "":
        return None
    return cell if name == "weights" else int(cell) if name in WHOLE else float(cell)
