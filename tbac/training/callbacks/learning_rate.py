"""The learning rate of each step."""

import lightning as L

from tbac.types import Batch


class LearningRate(L.Callback):
    """Logs `train/lr`: the rate that the step has had, the same for all parameters."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        pl_module.log("train/lr", trainer.optimizers[0].param_groups[0]["lr"])
