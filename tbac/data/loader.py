"""A DataLoader whose errors read the same with and without workers, and that outlives its workers."""

import gc
import logging
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from itertools import islice
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader, Sampler

from tbac.data.shards import DataError
from tbac.types import Batch

log = logging.getLogger(__name__)
MOST_DEATHS = 3  # of workers, one after the other, without a batch between them


class Remainder(Sampler):
    """What is left of an order after its first elements.

    Args:
        order: gives the same elements whenever it is iterated.
    """

    def __init__(self, order: Sampler) -> None:
        self.order = order
        self.done = 0  # how many elements are left out

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.order), self.done, None)

    def __len__(self) -> int:
        return len(self.order)  # type: ignore[arg-type]  # an endless order has none, and says so


class CleanLoader(DataLoader):
    """A DataLoader whose data errors read the same whether a worker process or this one met them.

    Workers don't garbage-collect what they have inherited. Python's collector writes into each object that it visits,
    and a page that is written to is copied, so each worker would end up with a copy of this process's memory.

    When a worker is killed, all of them are started anew and go on after the last batch that was used. A signal to the
    whole group of processes, which asks the run to end, leaves them alone until the step in hand is over.
    """

    def __init__(self, dataset: Any, sampler: Sampler, **options: Any) -> None:
        self.ending = mmap.mmap(-1, 1)  # shared with the workers: not 0 when this process ends
        prepare = partial(spare_worker, self.ending)
        super().__init__(dataset, sampler=Remainder(sampler), worker_init_fn=prepare, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        remainder, deaths = self.sampler, 0
        assert isinstance(remainder, Remainder)
        remainder.done = 0
        while True:
            try:
                for batch in self._start():
                    remainder.done, deaths = remainder.done + 1, 0
                    yield batch
                return
            # torch puts the traceback of a worker into the message; only what follows the last error's name is ours.
            except DataError as error:
                raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None
            except RuntimeError as error:
                text = str(error)
                if not text.startswith("DataLoader worker (pid"):
                    raise
                deaths += 1
                if deaths > MOST_DEATHS:
                    raise DataError(
                        f"{text.splitlines()[0]}, {deaths} times one after the other, as when memory is short; "
                        f"try fewer than data.num_workers={self.num_workers}"
                    ) from None
                log.warning("%s; the loader's processes are started anew", text.splitlines()[0])

    def _start(self) -> Iterator[Batch]:
        """Start the workers, if there are any, and iterate from the place that the sampler is at."""
        # Workers are forked by the next call, and inherit that everything is frozen.
        if self.num_workers:
            Finalize(None, self.ending.__setitem__, (0, 1), exitpriority=10)  # before workers are told to end
            gc.collect()
            gc.freeze()
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return super().__iter__()
        finally:
            gc.unfreeze()
            # torch would raise the error of a dead worker wherever training is, such as in the middle of a step.
            # Without its handler the error comes when the next batch is asked for.
            if self.num_workers and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, before)


def spare_worker(ending: mmap.mmap, number: int) -> None:
    """Let a worker outlive signals to the whole group, until the process that it works for ends.

    Args:
        ending: not 0 when that process ends; the SIGTERM that tells its workers to end is obeyed then.
        number: of the worker.
    """

    def end_with_parent(received: int, frame: FrameType | None) -> None:
        if ending[0]:
            signal.signal(received, signal.SIG_DFL)
            os.kill(os.getpid(), received)

    signal.signal(signal.SIGTERM, end_with_parent)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
