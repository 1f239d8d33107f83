"""A DataLoader whose errors read the same with and without workers, and whose workers share this process's memory."""

import gc
from collections.abc import Iterator

from torch.utils.data import DataLoader

from tbac.data.shards import DataError
from tbac.types import Batch


class CleanLoader(DataLoader):
    """A DataLoader whose data errors read the same whether a worker process or this one met them.

    Workers don't garbage-collect what they have inherited. Python's collector writes into each object that it visits,
    and a page that is written to is copied, so each worker would end up with a copy of this process's memory.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Workers are forked by the next call, and inherit that everything is frozen.
        if self.num_workers:
            gc.collect()
            gc.freeze()
        try:
            batches = super().__iter__()
        finally:
            gc.unfreeze()
        try:
            yield from batches
        # torch puts the traceback of a worker into the message; only what follows the last error's name is ours.
        except DataError as error:
            raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None
