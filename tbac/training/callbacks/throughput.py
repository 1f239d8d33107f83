"""Samples per second, as the training loop really sees them, and where the samples came from."""

import time
from typing import Any

import lightning as L

from tbac.types import Batch


class Throughput(L.Callback):
    """Logs `train/samples_per_second` over all processes, and `train/drawn/<source>`, the samples taken of each source.

    Args:
        every: steps per measurement.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"callbacks.throughput.every must be at least 1, got {every}")
        self.every = every
        self._samples = 0
        self._started: float | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self._started is None:  # the first step warms up
            self._started = time.perf_counter()
            return
        self._samples += len(batch)
        if (batch_idx + 1) % self.every == 0:
            elapsed = time.perf_counter() - self._started
            pl_module.log("train/samples_per_second", self._samples * trainer.world_size / elapsed)
            self._samples, self._started = 0, time.perf_counter()
            drawn = getattr(trainer.datamodule, "drawn", {})  # type: ignore[attr-defined]
            pl_module.log_dict({f"train/drawn/{name}": float(count) for name, count in drawn.items()})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave validation out of the measurement."""
        self._samples, self._started = 0, None
