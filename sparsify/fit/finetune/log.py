"""What a run writes while it runs: two CSV files, TensorBoard's events, and at its end a picture."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify import extras
from sparsify.errors import BadFile, one_line
from sparsify.files.outputs import write_text
from sparsify.processes import Say

Value = float | int | str | None

LOSSES = ("classification", "logits", "tokens", "features", "attention", "mass", "basis_l1")
"""Terms of the loss, as weighted in it."""
METRICS = ("step", "stage", "epoch", "lr", "loss", *LOSSES, "images_per_s")
SCORES = ("agreement", "kl", "top1")
VALIDATION = ("step", "stage", "epoch", *SCORES, "images", "weights", "best")

INTEGERS = ("step", "stage", "images", "best")  # columns


class TrainingLog(contextlib.AbstractContextManager):
    """Writes FOLDER/metrics.csv, validation.csv, tensorboard/ and, when closed, curve.png. Use as a context manager.

    A row of metrics is with the operating system when `write_step` returns, and on the disk after `flush`; validation.csv
    is always whole. If TensorBoard or the picture fails, one line says so, and the run goes on.

    The folder is made where it is missing. After `resume_step` optimiser steps that are done and saved, rows of later ones
    are cut; None: a new run, whose rows replace those of an older one. `stages` are their names. The methods too raise
    `BadFile` where the files cannot be written, or are not a run's.
    """

    def __init__(
        self, folder: Path, stages: Sequence[str], resume_step: int | None, say: Say = lambda line: None
    ) -> None:
        self.folder, self.stages, self.say = folder, tuple(stages), say
        self.metrics, self.validations = folder / "metrics.csv", folder / "validation.csv"
        self.file: io.TextIOWrapper | None = None
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            _cut(self.metrics, METRICS, resume_step)
            _cut(self.validations, VALIDATION, resume_step)
            self.rows = _read_text(self.validations, VALIDATION)
            self.file = open(self.metrics, "a", buffering=1, encoding="utf-8", newline="")  # noqa: SIM115
        self.writer = csv.DictWriter(self.file, METRICS, lineterminator="\n")
        self.board = self._open_board(resume_step)

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BadFile(f"cannot write {self.metrics}: {one_line(error)}") from error

    def write_step(self, row: Mapping[str, Value]) -> None:
        """A row for an optimiser step: any of `METRICS`, `step` (from 1) and `stage` (from 0) always."""
        with self._writing():
            self.writer.writerow(_cells(row))
        scalars = {"loss/total": row.get("loss"), "lr": row.get("lr"), "images_per_s": row.get("images_per_s")}
        self._add_scalars(row, scalars | {f"loss/{name}": row.get(name) for name in LOSSES})

    def write_validation(self, row: Mapping[str, Value]) -> None:
        """A row for a validation: any of `VALIDATION`, `step`, `stage` and `weights` (current, ema, start) always.

        A row replaces an earlier one with the same three: a resumed run may validate once more.
        """
        cells = dict.fromkeys(VALIDATION, "") | _cells(row)
        self.rows = [r for r in self.rows if any(r[name] != cells[name] for name in ("step", "stage", "weights"))]
        self.rows.append(cells)
        _write(self.validations, VALIDATION, self.rows)
        ending = "_ema" if row.get("weights") == "ema" else ""
        self._add_scalars(row, {f"validation/{name}{ending}": row.get(name) for name in SCORES})

    def flush(self) -> None:
        """Puts all rows so far on the disk: call it before the state that they belong to is saved."""
        if self.file is None:
            return
        with self._writing():
            self.file.flush()
            os.fsync(self.file.fileno())
        self._call_board("flush")

    def close(self) -> None:
        """Closes the files and draws FOLDER/curve.png; a second call does nothing."""
        if self.file is None:
            return
        try:
            self.flush()
        finally:
            file, self.file = self.file, None
            with contextlib.suppress(OSError):  # `flush` has raised it
                file.close()
            self._call_board("close")
        try:
            from sparsify.reports import training_plot

            training_plot.draw(read(self.metrics), read(self.validations), self.folder / "curve.png", self.stages)
        except Exception as error:  # the CSV files hold the figures
            self.say(f"could not draw the plot ({one_line(error)})")

    def _open_board(self, resume_step: int | None) -> Any:
        """TensorBoard's writer, or None where there is none."""
        folder = self.folder / "tensorboard"
        try:
            extras.need("the log", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            if resume_step is None:
                for old in folder.glob("events.out.tfevents.*"):  # TensorBoard draws two runs in one folder as one
                    old.unlink()
            purge = None if resume_step is None else resume_step + 1
            return SummaryWriter(str(folder), purge_step=purge, flush_secs=20)  # type: ignore[no-untyped-call]
        except Exception as error:
            self._give_up_board(error)
        return None

    def _add_scalars(self, row: Mapping[str, Value], scalars: Mapping[str, Value]) -> None:
        for name, value in scalars.items():
            if value is not None and value != "":
                self._call_board("add_scalar", name, float(value), int(row["step"] or 0))

    def _call_board(self, method: str, *arguments: Any) -> None:
        """Calls a method of TensorBoard's writer; after an error nothing more is written for TensorBoard."""
        try:
            if self.board is not None:
                getattr(self.board, method)(*arguments)
        except Exception as error:
            self._give_up_board(error)

    def _give_up_board(self, error: Exception) -> None:
        self.board = None
        self.say(f"no TensorBoard log ({one_line(error)}); the CSV files are complete")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.csv or validation.csv as numbers, exact; None where a cell is empty. No file: no rows.

    Raises `BadFile` where it is not one of these files.
    """
    columns = VALIDATION if path.name.startswith("validation") else METRICS
    try:
        return [{name: _value(name, cell) for name, cell in row.items()} for row in _read_text(path, columns)]
    except (OSError, ValueError) as error:
        raise BadFile(f"cannot read {path}: {one_line(error)}") from error


def _read_text(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows as text; a last one that was cut short by a crash is left out."""
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
    """Keeps the header and the rows up to step `last`; None: the header."""
    rows = [] if last is None else _read_text(path, columns)
    _write(path, columns, [row for row in rows if int(row["step"]) <= (last or 0)])


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _cells(row: Mapping[str, Value]) -> dict[str, str]:
    """Values as text from which `float` makes the same number to the bit."""

    def cell(value: Value) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        return str(int(value)) if isinstance(value, int) else repr(float(value))

    return {name: cell(value) for name, value in row.items()}


def _value(name: str, cell: str) -> Any:
    if cell == "":
        return None
    return cell if name == "weights" else int(cell) if name in INTEGERS else float(cell)
