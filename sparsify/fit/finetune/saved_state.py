"""The state of a run on disk: everything that its next step depends on, in one safetensors file, whole or the former one.

What is drawn at random in a step depends on the seed and the step alone, so no generator has to be saved.
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

from sparsify.errors import BadFile, one_line
from sparsify.files import whole

FORMAT = "1"
GROUP = "group"  # of parameters: some optimisers keep a tensor there


class State(NamedTuple):
    """Where a run stands.

    Attributes:
        tensors: student, running mean, best so far and moments of the optimiser, by names with these prefixes: `student.`,
            `ema.`, `best.`, `optimiser.`.
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


def save(path: Path, state: State) -> None:
    """Writes the state; killed at any moment, the file is the former one or this one.

    Raises:
        BadFile: it cannot be written.
    """
    own = {key: t.clone() for key, t in state.tensors.items()}  # safetensors refuses tensors that share memory
    with whole(path) as temporary:
        save_file(own, temporary, metadata={"format": "pt", "run": FORMAT, "facts": json.dumps(state.facts)})


def load(path: Path) -> State:
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
        return State(tensors, json.loads(meta["facts"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadFile(f"{path} is no saved run ({one_line(error)}): start anew with --force") from None


def pack(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as named tensors and JSON-able values."""
    state = optimizer.state_dict()
    tensors, values = {}, {}
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
    """Puts back what `pack` took, into an optimiser over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    own_tensors: list[dict[str, Tensor]] = [{} for _ in facts["groups"]]
    for name, value in [*facts["values"].items(), *tensors.items()]:
        index, _, key = name.partition(".")
        if index.startswith(GROUP):
            own_tensors[int(index.removeprefix(GROUP))][key] = value
        else:
            state.setdefault(int(index), {})[key] = value
    former = optimizer.state_dict()["param_groups"]
    groups = [
        {
            **own,
            **{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()},
            **more,
            "params": own["params"],
        }
        for own, saved, more in zip(former, facts["groups"], own_tensors, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
