"""The state of a run between two steps, and on disk: all that its next step depends on, in one safetensors file.

Random numbers of a step depend on the seed and the step alone, so no generator has to be saved.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import field as data_field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsify.errors import BadFile, field, one_line
from sparsify.files.outputs import whole
from sparsify.files.plain_json import from_json, to_json
from sparsify.files.tensors import opened
from sparsify.fit.finetune.validation import ValidationScore

FORMAT = "1"
GROUP = "group"  # of parameters: some optimisers keep a tensor there


class SavedState(NamedTuple):
    """Where a run stands.

    Names of tensors have the prefixes `student.`, `ema.` (running mean of its weights), `best.` (best weights so far) and
    `optimiser.`. Facts are JSON-able: stage, step within it, steps in all, the optimiser's other values, scores, identity.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one prefix, without it."""
        return {key[len(name) + 1 :]: t for key, t in self.tensors.items() if key.startswith(f"{name}.")}


@dataclass
class RunStatus:
    """Where a run stands between two steps."""

    start: ValidationScore
    best: ValidationScore
    best_weights: dict[str, Tensor] | None = None  # None while the start is the best
    stage: int = 0  # number of the stage
    step: int = 0  # its steps that are done
    done: int = 0  # steps of all stages that are done
    saved_at: float = data_field(default_factory=time.monotonic)

    @classmethod
    def of(cls, start: ValidationScore, resume: SavedState | None) -> RunStatus:
        """Of a run that begins with a model of that score, or resumes from a saved state."""
        if resume is None:
            return cls(start, start)
        facts = resume.facts
        scores = ValidationScore.of(facts["start"]), ValidationScore.of(facts["best"])
        return cls(*scores, resume.part("best") or None, facts["stage"], facts["step"], facts["done"])

    def update_best(self, score: ValidationScore, model: nn.Module) -> bool:
        """Whether `score` is the best so far; if so, the weights of `model` are remembered."""
        better = score.better_than(self.best)
        if better:
            self.best = score
            self.best_weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
        return better

    def row(self, epoch: float, score: ValidationScore, weights: str, best: bool) -> dict[str, Any]:
        """A row of `TrainingLog.write_validation`."""
        row = {"step": self.done, "stage": self.stage, "epoch": epoch, "weights": weights, "best": int(best)}
        return row | asdict(score)


def prefixed(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under `name.`, on the CPU."""
    return {f"{name}.{key}": t.detach().cpu().contiguous() for key, t in tensors.items()}


def save(path: Path, state: SavedState) -> None:
    """Writes the state, or raises `BadFile`; if the process is killed, the file holds the former state or this one."""
    copies = {key: t.clone() for key, t in state.tensors.items()}  # safetensors refuses tensors that share memory
    with whole(path) as temporary:
        save_file(copies, temporary, metadata={"format": "pt", "run": FORMAT, "facts": to_json(state.facts)})


def load(path: Path) -> SavedState:
    """The state that `save` wrote; raises `BadFile` where it is missing or no such file."""
    try:
        with opened(path) as file:
            meta, tensors = file.metadata, {name: file.read(name) for name in file.entries}
        if meta.get("run") != FORMAT:
            raise ValueError("another format")
        return SavedState(tensors, from_json(meta["facts"]))
    except (OSError, KeyError, ValueError) as error:
        raise BadFile(f"{path} is not a saved run ({one_line(error)}): start again with {field('force')}") from None


def pack(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as named tensors and JSON-able values."""
    state = optimizer.state_dict()
    entries = {f"{i}.{key}": value for i, values in state["state"].items() for key, value in values.items()}
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in entries.items() if name not in tensors}
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(state["param_groups"]):
        groups.append({k: v for k, v in group.items() if k != "params" and not isinstance(v, Tensor)})
        tensors |= {f"{GROUP}{number}.{k}": v for k, v in group.items() if isinstance(v, Tensor)}
    return tensors, {"values": values, "groups": groups}


def unpack(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Restores what `pack` returned, in an optimiser over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, facts["groups"], strict=True):
        group |= {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}  # JSON makes lists of tuples
    for name, value in [*facts["values"].items(), *tensors.items()]:
        index, _, key = name.partition(".")
        if index.startswith(GROUP):
            groups[int(index.removeprefix(GROUP))][key] = value
        else:
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
