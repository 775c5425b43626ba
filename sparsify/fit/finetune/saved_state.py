"""The state of a run on disk: all that its next step depends on, in one safetensors file.

Random numbers of a step depend on the seed and the step alone, so no generator has to be saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify.errors import BadFile, field, one_line
from sparsify.files import whole

FORMAT = "1"
GROUP = "group"  # of parameters: some optimisers keep a tensor there


class SavedState(NamedTuple):
    """Where a run stands.

    Attributes:
        tensors: of the student, the running mean of its weights, the best weights so far, and the optimiser; names have the
            prefixes `student.`, `ema.`, `best.`, `optimiser.`.
        facts: JSON-able: stage, step within it, steps in all, the optimiser's other values, scores, identity of the run.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one prefix, without it."""
        return {key[len(name) + 1 :]: t for key, t in self.tensors.items() if key.startswith(f"{name}.")}


def prefixed(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under `name.`, on the CPU."""
    return {f"{name}.{key}": t.detach().cpu().contiguous() for key, t in tensors.items()}


def save(path: Path, state: SavedState) -> None:
    """Writes the state; whenever the process is killed, the file holds the former state or this one.

    Raises:
        BadFile: it cannot be written.
    """
    copies = {key: t.clone() for key, t in state.tensors.items()}  # safetensors refuses tensors that share memory
    with whole(path) as temporary:
        save_file(copies, temporary, metadata={"format": "pt", "run": FORMAT, "facts": json.dumps(state.facts)})


def load(path: Path) -> SavedState:
    """The state that `save` wrote.

    Raises:
        BadFile: missing, or no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if meta.get("run") != FORMAT:
            raise ValueError("another format")
        return SavedState(tensors, json.loads(meta["facts"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadFile(f"{path} is no saved run ({one_line(error)}): start anew with {field('force')}") from None


def pack(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as named tensors and JSON-able values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                values[f"{index}.{key}"] = value
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(state["param_groups"]):
        groups.append({k: v for k, v in group.items() if k != "params" and not isinstance(v, Tensor)})
        tensors |= {f"{GROUP}{number}.{k}": v for k, v in group.items() if isinstance(v, Tensor)}
    return tensors, {"values": values, "groups": groups}


def unpack(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Restores what `pack` returned, in an optimiser over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    group_tensors: list[dict[str, Tensor]] = [{} for _ in facts["groups"]]
    for name, value in [*facts["values"].items(), *tensors.items()]:
        index, _, key = name.partition(".")
        if index.startswith(GROUP):
            group_tensors[int(index.removeprefix(GROUP))][key] = value
        else:
            state.setdefault(int(index), {})[key] = value
    groups = []
    fresh = optimizer.state_dict()["param_groups"]
    for group, saved, saved_tensors in zip(fresh, facts["groups"], group_tensors, strict=True):
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}  # JSON makes lists of tuples
        groups.append({**group, **values, **saved_tensors, "params": group["params"]})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
