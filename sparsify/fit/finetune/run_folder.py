"""The folder of a run: what a killed one needs to go on, and what a finished one leaves.

run.json            what the run must be the same in to be resumed
recipe.yaml         the resolved recipe
start.safetensors   the model before the first step       } gone when the run is finished
state.safetensors   where it stood when last saved        }
metrics.csv, validation.csv, tensorboard/, curve.png
model.safetensors   the final file
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsify.errors import BadFile, UsageError, one_line
from sparsify.files import whole
from sparsify.fit.finetune import saved_state

HALF = (".*.*.????????", ".tmp*")  # files that a kill left half-written: `sparsify.files`'s and safetensors' own


class RunFolder:
    """Paths and rules of one run's folder; nothing is read or written before `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts, self.recipe = path / "run.json", path / "recipe.yaml"
        self.start, self.state = path / "start.safetensors", path / "state.safetensors"
        self.model = path / "model.safetensors"

    @property
    def unfinished(self) -> bool:
        """Whether a run began here and did not end."""
        return self.facts.exists() and self.start.exists()

    def open(
        self, identity: dict[str, Any], resume: bool, force: bool, say: Callable[[str], None]
    ) -> tuple[bool, saved_state.State | None]:
        """Whether the start model is to be read from here, and the state to go on from (None: the first step).

        Raises:
            BadFile: an unfinished run lies here and neither `resume` nor `force` is given; a damaged state.
            UsageError: the run to be resumed differs in recipe, data or model.
        """
        if not resume:
            if self.unfinished and not force:
                raise BadFile(
                    f"{self.path} holds an unfinished run: --resume goes on with it, --force throws it away, another "
                    "--output leaves it"
                )
            return False, None
        if not self.unfinished:
            say(f"nothing to resume in {self.path}: starting anew")
            return False, None
        former = self._former()
        if difference := _difference(former, json.loads(json.dumps(identity)), ""):
            raise UsageError(f"{self.path} is another run ({difference}): resume it as it was, or give --force instead")
        if not self.state.exists():
            say(f"{self.path}: no state was saved yet, going on from its calibrated model")
            return True, None
        found = saved_state.load(self.state)
        say(f"resuming {self.path} after {found.facts['done']} steps")
        return True, found

    def begin(self, identity: dict[str, Any], recipe: str) -> None:
        """Makes the folder for a new run; what an older one left is removed.

        Raises:
            BadFile: it cannot be written.
        """
        self.clear()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadFile(f"cannot write {self.path}: {one_line(error)}") from error
        for path, text in ((self.facts, json.dumps(identity, indent=1)), (self.recipe, recipe)):
            with whole(path) as temporary:
                Path(temporary).write_text(text, encoding="utf-8")

    def finish(self, model: Path) -> None:
        """Takes in the final file (a link where the file system has them) and removes what only a resumption needs."""
        self.model.unlink(missing_ok=True)
        try:
            os.link(model, self.model)
        except OSError:
            shutil.copyfile(model, self.model)
        self._remove(self.start, self.state, *self._left())

    def clear(self) -> None:
        """Removes what a run leaves here, and nothing else."""
        names = ("metrics.csv", "validation.csv", "curve.png", "tensorboard")
        self._remove(
            self.start, self.state, self.facts, self.recipe, self.model, *(self.path / name for name in names),
            *self._left(),
        )  # fmt: skip

    def _left(self) -> list[Path]:
        return [path for pattern in ("teacher-*", *HALF) for path in self.path.glob(pattern)]

    def _former(self) -> Any:
        try:
            return json.loads(self.facts.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadFile(f"{self.facts} cannot be read ({one_line(error)}): start anew with --force") from None

    def _remove(self, *paths: Path) -> None:
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _difference(former: Any, now: Any, place: str) -> str:
    """The first field in which two identities differ, in words; '' where they are the same."""
    if isinstance(former, dict) and isinstance(now, dict):
        pairs = [(key, former.get(key), now.get(key)) for key in [*former, *(k for k in now if k not in former)]]
    elif isinstance(former, list) and isinstance(now, list) and len(former) == len(now):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(former, now, strict=True))]
    else:
        if former == now:
            return ""
        return f"{place} was {_short(former)}, is {_short(now)}"
    inside = (_difference(a, b, f"{place}.{key}".lstrip(".")) for key, a, b in pairs)
    return next((found for found in inside if found), "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
