"""A DataLoader whose errors read alike everywhere, and whose workers share this process's memory."""

import gc
from collections.abc import Iterator

from torch.utils.data import DataLoader

from tbac.data.shards import DataError
from tbac.types import Batch


class CleanLoader(DataLoader):
    """A DataLoader whose data errors read the same whether a worker process or this one met them.

    Workers leave what they have inherited out of their garbage collection: going through it would write to its pages,
    and each worker would sooner or later hold a copy of this process's memory.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self.num_workers:
            gc.collect()
            gc.freeze()
        try:
            batches = super().__iter__()
        finally:
            gc.unfreeze()
        try:
            yield from batches
        except DataError as error:
            raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None
