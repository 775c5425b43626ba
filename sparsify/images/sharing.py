"""Images shared out among the processes of one command (`sparsify.processes`): each reads its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar

from torch.utils.data import Subset

from sparsify import processes
from sparsify.images.loaders import ImageBatches, LabelledBatches, Stream

L = TypeVar("L", ImageBatches, LabelledBatches)


def share(loader: L) -> L:
    """What this process reads of the images of `loader`: all of them if it is the only one, else every P-th.

    That there is nothing to read in a share is no error: it is for all processes together to say.
    """
    if processes.world() == 1:
        return loader
    whole: Any = loader.dataset
    if isinstance(whole, Stream):
        dataset: Any = Stream(_Every(whole.source), whole.transform)
    else:
        dataset = Subset(whole, range(processes.rank(), len(whole), processes.world()))
    return type(loader)(
        dataset, loader.batch_size, loader.workers, loader.strict, place=loader.place, num_classes=loader.num_classes,
        part=True,
    )  # fmt: skip


class _Every:
    """Items rank, rank + P, ... of a stream. timm's readers share out themselves, unevenly, unless told not to."""

    def __init__(self, source: Any) -> None:
        self.source = source
        reader: Any = getattr(source, "reader", None)
        if hasattr(reader, "dist_num_replicas"):
            reader.dist_rank, reader.dist_num_replicas = 0, 1

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.source), processes.rank(), None, processes.world())
