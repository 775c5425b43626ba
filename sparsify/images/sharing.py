"""Images shared out among the processes of one command (`sparsify.processes`): each reads its own part."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar

from torch.utils.data import Subset

from sparsify import processes
from sparsify.images.loaders import ImageBatches, LabelledBatches, Stream, read_whole

L = TypeVar("L", ImageBatches, LabelledBatches)


def share(loader: L) -> L:
    """The part of `loader` that this process reads: every P-th image of P processes.

    An empty part is no error: only all processes together know that there is nothing to read.
    """
    if processes.world() == 1:
        return loader
    whole: Any = loader.dataset
    if isinstance(whole, Stream):
        dataset: Any = Stream(_EveryPth(whole.source), whole.transform)
    else:
        dataset = Subset(whole, range(processes.rank(), len(whole), processes.world()))
    options: dict[str, Any] = {"strict": loader.strict, "name": loader.name, "num_classes": loader.num_classes}
    return type(loader)(dataset, loader.batch_size, loader.workers, part=True, **options)


class _EveryPth:
    """Items rank, rank + P, ... of a stream."""

    def __init__(self, source: Any) -> None:
        self.source = source
        read_whole(source)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.source), processes.rank(), None, processes.world())
