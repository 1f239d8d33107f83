"""A record of what each step was trained on."""

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L

from tbac.files import append_lines
from tbac.training.module import LadderTuningModule
from tbac.types import Batch

log = logging.getLogger(__name__)


class SampleLog(L.Callback):
    """Appends a line of JSON per batch to `rank_<n>.jsonl`, written out at once.

    A line holds `stage`, `step` (steps taken after this batch), `positions` in the sequence of draws, `keys`, the
    process's own `loss`, and whether the step was `rejected`. A run that goes on appends; where positions occur twice,
    the later line is of the weights that were kept. Lines that can't be written are kept until they can, and what is
    lost in the end is counted.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._waiting: list[str] = []
        self._failing = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        line = {
            "stage": pl_module.stage.name,
            "step": pl_module.steps,
            "positions": batch.positions,
            "keys": batch.keys,
            "loss": float(outputs["loss"]) * pl_module.stage.accumulate,  # Lightning divides it
            "rejected": pl_module.rejected,
        }
        self._waiting.append(json.dumps(line))
        self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._waiting and not self._write(trainer):
            log.warning("%d lines of %s are lost", len(self._waiting), self.folder)

    def _write(self, trainer: L.Trainer) -> bool:
        """Write the lines that wait; returns whether that was possible."""
        file = self.folder / f"rank_{trainer.global_rank}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_lines(file, self._waiting)
        except OSError as error:
            if not self._failing:
                log.warning("%s can't be written (%s); training goes on, and it is tried again", file, error)
            self._failing = True
            return False
        self._waiting, self._failing = [], False
        return True
