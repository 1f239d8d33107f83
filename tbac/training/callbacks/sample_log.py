"""A record of what each step was trained on."""

import json
from pathlib import Path
from typing import Any, TextIO

import lightning as L

from tbac.training.module import LadderTuningModule
from tbac.types import Batch


class SampleLog(L.Callback):
    """Appends a line of JSON per batch to `rank_<n>.jsonl`, written out at once.

    A line holds `stage`, `step` (steps taken after this batch), `positions` in the sequence of draws, `keys`, the
    process's own `loss`, and whether the step was `rejected`. A run that goes on appends; where positions occur twice,
    the later line is of the weights that were kept.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._file: TextIO | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / f"rank_{trainer.global_rank}.jsonl").open("a", buffering=1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        assert self._file is not None
        line = {
            "stage": pl_module.stage.name,
            "step": pl_module.steps,
            "positions": batch.positions,
            "keys": batch.keys,
            "loss": float(outputs["loss"]) * pl_module.stage.accumulate,  # Lightning divides it
            "rejected": pl_module.rejected,
        }
        print(json.dumps(line), file=self._file)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
