"""How a job runs: device and precision (`Compute`), who hears of its progress (`Listener`), and in how many processes.

Processes are those of one command that `accelerate launch` or `torchrun` started; a single process needs nothing of it. Rank
and number are read from the environment, so that the command line knows them before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sparsify import extras
from sparsify.errors import SparsifyError, UsageError, field, short

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Say = Callable[[str], None]  # takes lines for the person at the terminal

DTYPES = ("float32", "bfloat16", "float16")  # that every command takes; `evaluate` in Python also takes float64


@dataclass(frozen=True)
class Compute:
    """How a job computes."""

    device: str = "cpu"  # cpu, cuda, cuda:1, mps
    dtype: str = "float32"  # of the forward passes, one of `DTYPES`
    backend: str = "auto"  # what computes sparse attention, one of `sparsify.ops.backends.BACKENDS`
    kernel_precision: str = "input"  # what the CPU kernels store, one of `sparsify.ops.backends.PRECISIONS`
    batch_size: int | None = None  # images of a forward pass; None: the job's default
    micro_batch: int = 64  # maximum images of a forward/backward pass in training (gradient accumulation)
    workers: int = 0  # processes that read images; 0: this one

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch size {self.batch_size}: expected 1 or more")

    @property
    def torch_device(self) -> torch.device:
        """`device` for torch; `UsageError` where it cannot compute here."""
        return torch_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` for torch; `UsageError` for an unknown name."""
        import torch

        if self.dtype not in (*DTYPES, "float64"):
            raise UsageError(f"dtype '{self.dtype}': expected one of {', '.join(DTYPES)}")
        return cast("torch.dtype", getattr(torch, self.dtype))


@lru_cache
def torch_device(name: str | torch.device) -> torch.device:
    """torch's device of that name; `UsageError` where torch has none such, or cannot compute on it here."""
    import torch

    try:
        torch.zeros(1, device=name).item()  # not on meta
    except Exception:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        known = ", ".join(here)
        raise UsageError(
            f"{field('device')} {short(str(name), 80)} cannot be used here; this machine has {known}"
        ) from None
    return torch.device(name)


@dataclass(frozen=True)
class Listener:
    """Who is told how far a job is."""

    # called with a line for the user, in which fields are marked (`sparsify.errors.field`)
    say: Say = lambda line: None
    # called with the name of a step, images or steps done, their total (None: unknown), and maybe a note
    progress: Callable[..., None] = lambda *step: None


def rank() -> int:
    """Rank of this process, from 0."""
    return _number("RANK", 0)


def world() -> int:
    """Number of processes."""
    return _number("WORLD_SIZE", 1)


def main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def local_device(device: str) -> str:
    """The device of this process: for `cuda`, each of several processes gets a GPU of its own."""
    return f"cuda:{_number('LOCAL_RANK', 0)}" if device == "cuda" and world() > 1 else device


def start(device: str = "cpu") -> None:
    """Join the other processes: gloo for the CPU, nccl for a GPU. Does nothing for a single process, or a second time."""
    if world() > 1:
        extras.need(f"a command in {world()} processes", "accelerate")
        _state(device)


def gather(item: T) -> list[T]:
    """`item`, which can be pickled, of every process by rank, in every process. Every process must call it.

    Raises:
        SparsifyError: other code joined the processes first, and sees another number of them.
    """
    if world() == 1:
        return [item]
    _state("cpu")
    from accelerate.utils import gather_object

    items = cast(list[T], gather_object([item]))
    if len(items) != world():
        joined = f"{world()} processes were started, but accelerate joined {len(items)}"
        raise SparsifyError(f"{joined}: on CPUs give Accelerator(cpu=True)")
    return items


@contextmanager
def agree() -> Iterator[None]:
    """A `SparsifyError` that the block raises in any process is raised in all. Every process must run the block.

    Nothing inside may wait for another process. `agreed` is true of such an error, so that only one process prints it.
    """
    raised = None
    try:
        yield
    except SparsifyError as error:
        if world() == 1:
            raise
        raised = error
    first = next((error for error in gather(raised) if error is not None), None)
    if first is not None:
        vars(first)["agreed"] = True
        raise first


def agreed(error: SparsifyError) -> bool:
    """Whether all processes raise `error`: one of `agree`, or wrong usage."""
    return error.exit_code == UsageError.exit_code or bool(vars(error).get("agreed"))


def barrier() -> None:
    """Wait for every process to get here."""
    if world() > 1:
        _state("cpu").wait_for_everyone()


def _state(device: str) -> Any:
    """accelerate's record of the processes, one for the whole program: the first call decides the device."""
    from accelerate import PartialState

    return PartialState(cpu=not device.startswith("cuda"))


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise
