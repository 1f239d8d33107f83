"""A guard that watches every other step, so that one run times steps with and without it."""

import time
from typing import Any

from tbac.training.callbacks.guard import Guard

WARM_UP = 40  # the first steps aren't timed


class AlternatingGuard(Guard):
    """A guard that leaves every other batch alone, and times both kinds."""

    times: tuple[list[float], list[float]] = ([], [])  # without and with the guard, seconds
    _awake = False
    _started = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._awake = pl_module.measure_taps = bool(batch_idx % 2)
        self._started = time.perf_counter()
        if self._awake:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self._awake:
            super().on_before_backward(trainer, pl_module, loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._awake:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if batch_idx >= WARM_UP:
            self.times[batch_idx % 2].append(time.perf_counter() - self._started)
