"""Steps with and without the guard in turns."""

import time
from typing import Any

from tbac.training.callbacks import Callback
from tbac.training.callbacks.guard import Guard

WARM_UP = 40  # steps that aren't counted


class Alternate(Callback):
    """Takes the guard away for every other batch, and times both kinds."""

    times: tuple[list[float], list[float]] = ([], [])  # without and with the guard, seconds

    def __init__(self) -> None:
        self._guard: Any = None
        self._started = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._guard = next(c for c in trainer.callbacks if isinstance(c, Guard))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        guarded = bool(batch_idx % 2)
        trainer.callbacks = [c for c in trainer.callbacks if c is not self._guard]
        if guarded:
            trainer.callbacks.append(self._guard)
            self._guard.on_train_batch_start(trainer, pl_module, batch, batch_idx)
        pl_module.measure_taps = guarded
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= WARM_UP:
            self.times[batch_idx % 2].append(time.perf_counter() - self._started)
