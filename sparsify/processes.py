"""How a job runs: device and precision (`Compute`), who hears of its progress (`Listener`), and in how many processes.

Processes are those of one command that `accelerate launch` or `torchrun` started; a single process needs nothing of it. Rank
and number are read from the environment, so that the command line knows them before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sparsify.errors import SparsifyError, UsageError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Compute:
    """How a job computes.

    Attributes:
        device: cpu, cuda, cuda:1, mps.
        dtype: of the forward passes, one of `DTYPES`.
        backend: what computes sparse attention, one of `sparsify.ops.backends.BACKENDS`.
        kernel_precision: what the CPU kernels store, one of `sparsify.ops.backends.PRECISIONS`.
        batch_size: images of a forward pass; None: the job's default.
        micro_batch: maximum images of a forward/backward pass in training (gradient accumulation).
        workers: processes that read images; 0: this one.
    """

    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "auto"
    kernel_precision: str = "input"
    batch_size: int | None = None
    micro_batch: int = 64
    workers: int = 0

    @property
    def torch_device(self) -> torch.device:
        """`device` for torch."""
        import torch

        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` for torch.

        Raises:
            UsageError: an unknown name.
        """
        import torch

        if self.dtype not in DTYPES:
            raise UsageError(f"dtype '{self.dtype}': expected one of {', '.join(DTYPES)}")
        return cast("torch.dtype", getattr(torch, self.dtype))


@dataclass(frozen=True)
class Listener:
    """Who is told how far a job is.

    Attributes:
        say: called with a line for the user, in which fields are marked (`sparsify.errors.field`).
        progress: called with the name of a step, images or steps done, their total (None: unknown), and maybe a note.
    """

    say: Callable[[str], None] = lambda line: None
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
        _state(device)


def gather(item: T) -> list[T]:
    """`item` of every process by rank, in every process; [item] for a single process. Every process must call it.

    Args:
        item: can be pickled.

    Raises:
        SparsifyError: other code joined the processes first, and sees another number of them.
    """
    if world() == 1:
        return [item]
    _state("cpu")
    from accelerate.utils import gather_object

    items = cast(list[T], gather_object([item]))
    if len(items) != world():
        raise SparsifyError(
            f"{world()} processes were started, but accelerate joined {len(items)}: on CPUs give Accelerator(cpu=True)"
        )
    return items


@contextmanager
def agree() -> Iterator[None]:
    """A `SparsifyError` that the block raises in any process is raised in all. Every process must run the block.

    Nothing inside may wait for another process. `agreed` is true of such an error, so that only one process prints it.
    """
    if world() == 1:
        yield
        return
    raised = None
    try:
        yield
    except SparsifyError as error:
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
