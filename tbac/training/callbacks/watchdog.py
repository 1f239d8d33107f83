"""Ends a job of several processes with a message when one of them is stuck or gone."""

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from typing import Any

import lightning as L
from torch import distributed

from tbac.distributed import gather_objects, get_rank, get_world_size
from tbac.training.module import LadderTuningModule

log = logging.getLogger(__name__)


class Watchdog(L.Callback):
    """Each process tells the others, from a thread, that it is alive and how far it has come.

    When no process has made progress for `stuck_minutes`, all of them end with exit status 1; the message names the
    one that is furthest behind, and a traceback shows where it hangs. They also end when a process has given no sign of
    life for `gone_seconds`, and when one has ended with an error, which the message repeats. Otherwise collective
    operations would wait for their own timeout, or end with an error that doesn't say which process is to blame.

    Args:
        stuck_minutes: minutes without progress; more than anything other than a batch takes, such as the pictures of a
            validation.
        gone_seconds: seconds without a sign of life.
        beat_seconds: seconds between signs of life.

    Raises:
        ValueError: for values that aren't positive.
    """

    def __init__(self, stuck_minutes: float = 15.0, gone_seconds: float = 30.0, beat_seconds: float = 1.0) -> None:
        for name, value in (("stuck_minutes", stuck_minutes), ("gone_seconds", gone_seconds)):
            if value <= 0:
                raise ValueError(f"callbacks.watchdog.{name} must be positive, got {value}")
        self.stuck_seconds, self.gone_seconds, self.beat_seconds = 60 * stuck_minutes, gone_seconds, beat_seconds
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: distributed.TCPStore | None = None  # rank 0 serves it, to those that end later too
        self._progress = 0
        self._module: LadderTuningModule | None = None
        self._where = "start"
        self._ended: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        self._module = pl_module
        if get_world_size() > 1 and self._thread is None:
            self._store = open_store()
            self._done.clear()
            self._thread = threading.Thread(target=self._watch, args=(self._store,), name="watchdog", daemon=True)
            self._thread.start()

    def _moved(self, where: str) -> None:
        self._progress += 1
        self._where = where

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        self._moved(f"batch {batch_idx} of stage {pl_module.stage.name}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        self._moved(f"the end of batch {batch_idx} of stage {pl_module.stage.name}")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._moved(f"validation batch {batch_idx}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._moved("the end of a validation")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tell the other processes what ended this one."""
        if self._thread is None:
            return
        # A signal ends all processes after the same step, in good order; the first one may still be writing.
        if isinstance(exception, SystemExit):
            self._stop()
            return
        # An error of the connection only says that another process is gone; the thread finds out which, and ends this.
        if _lost_connection(exception):
            self._thread.join(self.gone_seconds + 10 * self.beat_seconds)
        self._ended = f"{type(exception).__name__}: {exception}".split("\n")[0]
        self._thread.join(3 * self.beat_seconds)  # time to say so
        self._stop()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, store: Any) -> None:
        ranks = range(get_world_size())
        names = [str(r) for r in ranks]
        # What was last seen of each process (beat, progress), and when each of the two last changed. Times are this
        # machine's: clocks of different nodes may disagree.
        beats, seen = 0, [(-1, -1)] * len(ranks)
        alive = [time.monotonic()] * len(ranks)
        moved = list(alive)
        states: list[dict[str, Any]] = []
        while not self._done.wait(self.beat_seconds):
            beats += 1
            now = time.monotonic()
            # Tell the others, and read what they tell once all of them have started.
            try:
                store.set(names[get_rank()], json.dumps(self._describe_state(beats)))
                if store.check(names):
                    states = [json.loads(text) for text in store.multi_get(names)]
            except RuntimeError:
                # The store is rank 0's. When training is over it may close, and otherwise rank 0 is gone.
                if self._done.is_set() or (states and states[0]["done"]):
                    return
                where = states[0]["where"] if states else "start"
                self._end(f"rank 0 is gone; it was at {where}")
            # A process is alive when its beat has changed, and has moved when its progress has.
            for r, state in enumerate(states):
                alive[r] = now if state["beat"] != seen[r][0] else alive[r]
                moved[r] = now if state["progress"] != seen[r][1] else moved[r]
                seen[r] = (state["beat"], state["progress"])
            if self._ended is None:
                self._judge(states, [now - t for t in alive], [now - t for t in moved])
        # The others needn't wait for signs of life of a process that is done with training.
        with contextlib.suppress(RuntimeError):
            store.set(names[get_rank()], json.dumps(self._describe_state(beats + 1) | {"done": True}))

    def _describe_state(self, beat: int) -> dict[str, Any]:
        """Describe this process for the others."""
        # A batch that has begun counts as progress: processes that wait for a stuck one have begun it, and that one
        # hasn't.
        begun = self._module.begun if self._module else 0
        return {
            "beat": beat,
            "progress": self._progress + begun,
            "where": self._where,
            "ended": self._ended,
            "done": False,  # when training is over, the process may leave, or be busy with something else
        }

    def _judge(self, states: list[dict[str, Any]], silent: list[float], still: list[float]) -> None:
        """End this process when another one ended, is gone, or is stuck."""
        for r, state in enumerate(states):
            if state["ended"] and r != get_rank():
                self._end(f"rank {r} ended at {state['where']}: {state['ended']}")
        for r, seconds in enumerate(silent):
            if states and seconds > self.gone_seconds and r != get_rank() and not states[r]["done"]:
                self._end(f"rank {r} gave no sign of life for {seconds:.0f} s; it was at {states[r]['where']}")
        if states and min(still) > self.stuck_seconds and not any(s["done"] for s in states):
            behind = min(s["progress"] for s in states)
            stuck = [f"rank {r} at {s['where']}" for r, s in enumerate(states) if s["progress"] == behind]
            if states[get_rank()]["progress"] == behind:
                faulthandler.dump_traceback(all_threads=True, file=sys.stderr)
            self._end(f"no progress for {min(still):.0f} s; furthest behind: {', '.join(stuck)}")

    def _end(self, message: str) -> None:
        print(
            f"error: rank {get_rank()} stops the job: {message}. Start it again to go on.", file=sys.stderr, flush=True
        )
        os._exit(1)


def open_store() -> distributed.TCPStore:
    """Open a store of strings that all processes share and that threads may use; all processes must call this."""
    address, port = os.environ["MASTER_ADDR"], 0  # 0: any free port
    store = None
    if get_rank() == 0:
        store = distributed.TCPStore(address, port, is_master=True, wait_for_workers=False)
        port = store.port
    port = gather_objects(port)[0]
    return store or distributed.TCPStore(address, port, is_master=False)


def _lost_connection(exception: BaseException) -> bool:
    """Whether an error of a collective operation says that another process is gone."""
    return isinstance(exception, distributed.DistError) or (
        isinstance(exception, RuntimeError) and "gloo" in str(exception).lower()
    )
