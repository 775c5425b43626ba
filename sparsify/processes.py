"""How a command runs: on which device, in how many processes, and who is told.

`Compute` and `Listener` are what jobs are handed. The rest is about several processes of one command, as `accelerate launch`
and `torchrun` start them; a single one costs nothing. The number of a process is read from the environment, so that the
command line can ask for it before torch is imported.
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

Found = TypeVar("Found")

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Compute:
    """How a job computes.

    Attributes:
        device: of torch: cpu, cuda, cuda:1, mps.
        dtype: of the forward passes, one of `DTYPES`.
        backend: what computes the sparse form, one of `sparsify.ops.backends.BACKENDS`.
        kernel_precision: what the CPU kernels store, one of `sparsify.ops.backends.PRECISIONS`.
        batch_size: images of a forward pass; None: the job's own.
        micro_batch: most images of one forward and backward pass of a training step (gradient accumulation).
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
        """The device as torch has it."""
        import torch

        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it.

        Raises:
            UsageError: an unknown name.
        """
        import torch

        if self.dtype not in DTYPES:
            raise UsageError(f"dtype '{self.dtype}': expected one of {', '.join(DTYPES)}")
        return cast("torch.dtype", getattr(torch, self.dtype))


@dataclass(frozen=True)
class Listener:
    """Who is told how a job goes on.

    Attributes:
        say: called with lines for the person at the terminal; fields are marked (`sparsify.errors.field`).
        progress: called with the step's name, images or steps done, how many in all (None: unknown), and maybe a note.
    """

    say: Callable[[str], None] = lambda line: None
    progress: Callable[..., None] = lambda *step: None


def rank() -> int:
    """Number of this process, from 0."""
    return _number("RANK", 0)


def world() -> int:
    """How many processes there are."""
    return _number("WORLD_SIZE", 1)


def main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def place(device: str) -> str:
    """The device of this process: of several, each gets a GPU of its own where `cuda` is asked for."""
    return f"cuda:{_number('LOCAL_RANK', 0)}" if device == "cuda" and world() > 1 else device


def start(device: str = "cpu") -> None:
    """Join the other processes: gloo for the CPU, nccl for a GPU. Nothing for a single process, or a second time."""
    if world() > 1:
        _state(device)


def gather(item: Found) -> list[Found]:
    """`item` of every process, in the order of their ranks, in every process; [item] for a single one.

    Every process must call it. `item` can be pickled.

    Raises:
        SparsifyError: the processes were joined by somebody else, who sees another number of them.
    """
    if world() == 1:
        return [item]
    _state("cpu")
    from accelerate.utils import gather_object

    found = cast(list[Found], gather_object([item]))
    if len(found) != world():
        raise SparsifyError(
            f"{world()} processes were started, but accelerate joined {len(found)}: on CPUs give Accelerator(cpu=True)"
        )
    return found


@contextmanager
def agree() -> Iterator[None]:
    """Every process must come here. A `SparsifyError` that the block raises in any of them is raised in all of them.

    Nothing inside may wait for another process. `agreed` tells such an error, so that one process alone says it.
    """
    if world() == 1:
        yield
        return
    own = None
    try:
        yield
    except SparsifyError as error:
        own = error
    first = next((error for error in gather(own) if error is not None), None)
    if first is not None:
        vars(first)["agreed"] = True
        raise first


def agreed(error: SparsifyError) -> bool:
    """Whether all processes raise `error`: those of `agree`, and options that cannot be understood."""
    return error.exit_code == UsageError.exit_code or bool(vars(error).get("agreed"))


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        _state("cpu").wait_for_everyone()


def _state(device: str) -> Any:
    """accelerate's own record of the processes, one for the whole program: the first call decides the device."""
    from accelerate import PartialState

    return PartialState(cpu=not device.startswith("cuda"))


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise
