"""The folder of a run: what a killed run needs to be resumed, and what a finished run leaves.

run.json            identity of the run (`Plan.identity`)
recipe.yaml         the resolved recipe
start.safetensors   the model before the first step       } removed when the run is finished
state.safetensors   the state when last saved             }
metrics.csv, validation.csv, tensorboard/, curve.png      (`log`)
model.safetensors   the final file
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsify.errors import BadFile, UsageError, field, one_line
from sparsify.files.destinations import check_folder
from sparsify.files.locks import scratch
from sparsify.files.outputs import write_all
from sparsify.files.plain_json import from_json
from sparsify.fit.finetune import saved_state
from sparsify.fit.finetune.saved_state import SavedState


class RunFolder:
    """Paths and rules of one run's folder; nothing is read or written before `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts, self.recipe = path / "run.json", path / "recipe.yaml"
        self.start, self.state = path / "start.safetensors", path / "state.safetensors"
        self.model = path / "model.safetensors"

    @property
    def unfinished(self) -> bool:
        """Whether a run began here and is not finished."""
        return self.facts.exists() and self.start.exists()

    def open(
        self, identity: dict[str, Any], resume: bool, force: bool, say: Callable[[str], None]
    ) -> tuple[bool, SavedState | None]:
        """Whether the start model is to be read from here, and the state to resume from (None: the first step).

        Raises `BadFile` where an unfinished run lies here and neither `resume` nor `force` is given, its state is damaged or
        the folder cannot be written, and `UsageError` where the run to be resumed has another recipe, data or model.
        """
        check_folder(self.path)
        if not resume:
            if self.unfinished and not force:
                choices = f"{field('resume')} goes on with it, {field('force')} throws it away"
                choices += f", another {field('output')} leaves it"
                raise BadFile(f"{self.path} holds an unfinished run: {choices}")
            return False, None
        if not self.unfinished:
            say(f"nothing to resume in {self.path}: starting from the beginning")
            return False, None
        if difference := _difference(self._identity(), json.loads(json.dumps(identity)), ""):
            advice = f"resume it as it was, or give {field('force')} instead"
            raise UsageError(f"{self.path} is another run ({difference}): {advice}")
        if not self.state.exists():
            say(f"{self.path}: no saved state yet, continuing from its calibrated model")
            return True, None
        state = saved_state.load(self.state)
        say(f"resuming {self.path} after {state.facts['done']} steps")
        return True, state

    def begin(self, identity: dict[str, Any], recipe: str) -> None:
        """Makes the folder for a new run; what an older run left is removed. Raises `BadFile` if it cannot be written."""
        self.clear()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadFile(f"cannot write {self.path}: {one_line(error)}") from error
        write_all({self.facts: identity, self.recipe: recipe})

    def finish(self, model: Path) -> None:
        """Adds the final file (a hard link where the file system has them) and removes what only resuming needs."""
        try:
            with scratch(self.path) as folder:
                copy = folder / "file"
                try:
                    os.link(os.path.realpath(model), copy)
                except OSError:
                    shutil.copyfile(model, copy)
                os.replace(copy, self.model)
        except OSError as error:
            raise BadFile(f"cannot write {self.model}: {one_line(error)}") from error
        self._remove()

    def clear(self) -> None:
        """Removes what a run leaves here, and nothing else."""
        written = "metrics.csv validation.csv curve.png tensorboard".split()
        self._remove(self.facts, self.recipe, self.model, *(self.path / name for name in written))

    def _identity(self) -> Any:
        """Of the run that lies here."""
        try:
            return from_json(self.facts.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problem = f"{self.facts} cannot be read ({one_line(error)})"
            raise BadFile(f"{problem}: start again with {field('force')}") from None

    def _remove(self, *paths: Path) -> None:
        """Removes `paths` and what only an unfinished run needs."""
        for path in (self.start, self.state, *paths, *self.path.glob("teacher-*")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _difference(former: Any, now: Any, name: str) -> str:
    """The first field in which two identities differ, as text; '' where they are the same. `name`: of what is compared."""
    if isinstance(former, dict) and isinstance(now, dict):
        pairs = [(key, former.get(key), now.get(key)) for key in [*former, *(k for k in now if k not in former)]]
    elif isinstance(former, list) and isinstance(now, list) and len(former) == len(now):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(former, now, strict=True))]
    else:
        return "" if former == now else f"{name} was {_short(former)}, is {_short(now)}"
    inside = (_difference(a, b, f"{name}.{key}".lstrip(".")) for key, a, b in pairs)
    return next(filter(None, inside), "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
