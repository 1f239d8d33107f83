"""Stages in sequence within one process, each as a job of its own would run it."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy

from tbac.data.datamodule import StagedDataModule
from tbac.distributed import gather_objects
from tbac.training.module import LadderTuningModule
from tbac.training.optimizers import load_named_state, named_state
from tbac.training.stages import Stage
from tbac.types import Batch

log = logging.getLogger(__name__)


class StageTransition(L.Callback):
    """Decides when to validate and when a stage is over, and begins the next one.

    A stage is one epoch of Lightning's. At its end its callbacks end as at the end of a job, which leaves the weight
    average in the model; then data, loss, what trains, optimizer, schedule and callbacks are those of the next stage.
    Decisions follow from numbers that all processes share: steps taken, samples drawn, the mean validation loss.

    Args:
        stages: in their order.
        current: index of the one to begin with.
        history: reports of the stages before.
        optimizer_state: by parameter name, for a first stage that keeps the optimizer's state.
        origin: what this process starts or goes on from.

    Raises:
        ValueError: in `setup`, when processes have found different checkpoints to begin with.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        current: int = 0,
        history: Sequence[Mapping[str, Any]] = (),
        optimizer_state: Mapping[str, dict[str, Any]] | None = None,
        origin: str | None = None,
    ) -> None:
        self.origin = origin
        self.stages, self.current = list(stages), current
        self.history = [dict(report) for report in history]
        self._optimizer_state = optimizer_state
        self._forget()

    def _forget(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self.best = math.inf
        self.stale = 0

    @property
    def stage(self) -> Stage:
        return self.stages[self.current]

    def reports(self, module: LadderTuningModule) -> list[dict[str, Any]]:
        """Name, steps, and first and last validation loss of each stage so far."""
        losses = {"val_loss_first": self.first, "val_loss_last": self.last}
        return [*self.history, {"name": self.stage.name, "steps": module.steps, **losses}]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        origins = gather_objects(self.origin)
        if len(set(origins)) > 1:
            found = ", ".join(f"rank {rank}: {origin}" for rank, origin in enumerate(origins))
            raise ValueError(f"processes would begin from different checkpoints ({found}); give resume= or init=")
        self._prepare(trainer, pl_module)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Everything of the current stage that is set before its optimizer is made."""
        assert isinstance(pl_module, LadderTuningModule)
        data = self._data(trainer)
        data.current = self.current
        trainer.gradient_clip_val = self.stage.clip
        trainer.accumulate_grad_batches = self.stage.accumulate
        samples = data.active.batch_size * trainer.world_size * self.stage.accumulate
        pl_module.enter(self.stage, self.stage.total_steps(samples))

    @staticmethod
    def _data(trainer: L.Trainer) -> StagedDataModule:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, StagedDataModule)
        return data

    def _over(self, trainer: L.Trainer, pl_module: LadderTuningModule) -> bool:
        return self.stage.over(pl_module.steps, self._data(trainer).active.position, self.stale)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        if self._over(trainer, pl_module):  # the checkpoint was the last one
            trainer.should_stop = True
        elif self._optimizer_state and not pl_module.steps and self.stage.keep_optimizer:
            load_named_state(trainer.optimizers[0], pl_module, self._optimizer_state)
        self._optimizer_state = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate before the first step."""
        assert isinstance(pl_module, LadderTuningModule)
        log.info("stage %s from step %d", self.stage.name, pl_module.steps)
        if self.first is None and not pl_module.steps:
            self._validate(trainer)

    @staticmethod
    def _validate(trainer: L.Trainer) -> None:
        """Run the validation loop now, as Lightning's training loop does between two batches."""
        connector = trainer._logger_connector
        kept = connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        connector._first_loop_iter = kept

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        due = pl_module.stepped and pl_module.steps % self.stage.val_every == 0
        trainer.val_check_batch = batch_idx + 1 if due else math.inf
        if pl_module.attempted and self._over(trainer, pl_module):
            trainer.should_stop = True  # Lightning validates and ends the epoch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.state.fn != "fit" or loss is None:
            return
        self.last = float(loss)
        if not pl_module.steps:
            self.first = self.last
            return
        if self.last < self.best - self.stage.min_delta:
            self.best, self.stale = self.last, 0
        else:
            self.stale += 1
        if self._over(trainer, pl_module):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the next stage, unless something else ends the run."""
        assert isinstance(pl_module, LadderTuningModule)
        if not self._over(trainer, pl_module) or self.current + 1 == len(self.stages):
            return
        self.history = self.reports(pl_module)
        state = named_state(trainer.optimizers[0], pl_module)
        self._end_callbacks(trainer, pl_module)
        self._forget()
        self.current += 1
        self._prepare(trainer, pl_module)
        if isinstance(trainer.strategy, DDPStrategy):  # what is synchronised is settled when the model is wrapped
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()
        trainer.strategy.setup_optimizers(trainer)
        if self.stage.keep_optimizer:
            load_named_state(trainer.optimizers[0], pl_module, state)
        self._begin_callbacks(trainer, pl_module)
        trainer.should_stop = False

    def _end_callbacks(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        own = [c for c in trainer.callbacks if c in self.stage.callbacks]  # type: ignore[attr-defined]
        for callback in own:
            callback.on_train_end(trainer, pl_module)
        for callback in own:
            callback.on_fit_end(trainer, pl_module)
            callback.teardown(trainer, pl_module, "fit")

    def _begin_callbacks(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before = self.stages[self.current - 1].callbacks
        others = [c for c in trainer.callbacks if c not in before]  # type: ignore[attr-defined]
        ordered = sorted([*self.stage.callbacks, *others], key=lambda c: isinstance(c, Checkpoint))
        trainer.callbacks = ordered  # type: ignore[attr-defined]
        for callback in self.stage.callbacks:
            callback.setup(trainer, pl_module, "fit")
        for callback in self.stage.callbacks:
            callback.on_fit_start(trainer, pl_module)
        for callback in self.stage.callbacks:
            callback.on_train_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        names = ("first", "last", "best", "stale", "history")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
