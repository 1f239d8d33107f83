"""Stages in sequence within one process, each as a job of its own would run it.

Each stage is a `fit` of its own: the model, the data and the processes stay, while trainer, optimizer, schedule and
callbacks are new. Therefore a stage in a sequence gives the same bits as a job of its own. The other way was tried too,
one fit with an epoch of Lightning's for each stage. It needed changes to Lightning's private state to reach the same
bits: to its optimizers, its wrapper of the model, its callbacks and its counters.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import lightning as L

from tbac.data.datamodule import StagedDataModule
from tbac.distributed import gather_objects
from tbac.files import reading
from tbac.training.module import LadderTuningModule
from tbac.training.optimizers import collect_named_state
from tbac.training.run_logger import RunLogger
from tbac.training.stages import Stage
from tbac.types import Batch

log = logging.getLogger(__name__)
MakeTrainer = Callable[[int, Sequence[L.Callback]], L.Trainer]


class StageTransition(L.Callback):
    """Decides when to validate and when a stage is over, and goes over to the next one.

    At the end of a stage its callbacks end as at the end of a job, which leaves the weight average in the model; then
    data, loss, what trains, optimizer, schedule and callbacks are those of the next stage. Decisions follow from
    numbers that all processes share: steps taken, samples drawn, the mean validation loss.

    Args:
        stages: in their order.
        current: index of the one to begin with.
        history: reports of the stages before.
        optimizer_state: by parameter name, for a first stage that keeps the optimizer's state.
        origin: what this process starts or goes on from.
        checkpoint: what the first stage goes on from, with its weights in the model already; None begins the stage.

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
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        self.stages, self.current = list(stages), current
        self.history = [dict(report) for report in history]
        self.origin, self.checkpoint = origin, checkpoint
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

    def list_reports(self, module: LadderTuningModule) -> list[dict[str, Any]]:
        """List name, steps, and first and last validation loss of each stage so far."""
        losses = {"val_loss_first": self.first, "val_loss_last": self.last}
        return [*self.history, {"name": self.stage.name, "steps": module.steps, **losses}]

    def fit(self, make_trainer: MakeTrainer, module: LadderTuningModule, data: StagedDataModule) -> None:
        """Run the current stage and all that follow it.

        Args:
            make_trainer: index of a stage, callbacks -> a new trainer for that stage.
            module: is trained.
            data: of all stages.
        """
        while True:
            trainer = make_trainer(self.current, [*self.stage.callbacks, self])
            # A stage that goes on has had its first validation.
            if self.checkpoint is None:
                losses = trainer.validate(module, datamodule=data, verbose=False)
                self.first = losses[0].get("val/loss") if losses else None
            trainer.fit(module, datamodule=data)
            # Something else than the stage's own end, such as the trainer's `max_steps`, ends the run.
            if not self._over(trainer, module) or self.current + 1 == len(self.stages):
                return
            # What the next stage takes over: the steps of the run so far, and this stage's report.
            module.first_step += trainer.global_step
            self.history = self.list_reports(module)
            self._forget()
            self.current += 1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let module and data enter the current stage, before its optimizer is made."""
        origins = gather_objects(self.origin)
        if len(set(origins)) > 1:
            named = ", ".join(f"rank {rank}: {origin}" for rank, origin in enumerate(origins))
            raise ValueError(f"processes would begin from different checkpoints ({named}); give resume= or init=")
        assert isinstance(pl_module, LadderTuningModule)
        data = self._data(trainer)
        data.current = self.current
        samples_per_step = data.active.batch_size * trainer.world_size * self.stage.accumulate
        pl_module.enter(self.stage, self.stage.count_steps(samples_per_step))
        if self.checkpoint is not None:
            self._go_on(trainer, pl_module, self.checkpoint)
            self.checkpoint = None
        elif self.stage.keep_optimizer:
            pl_module.inherited_optimizer_state = self._optimizer_state
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.first_step = pl_module.first_step

    def _go_on(self, trainer: L.Trainer, pl_module: LadderTuningModule, checkpoint: Mapping[str, Any]) -> None:
        """Restore everything from a checkpoint.

        Lightning's `ckpt_path` isn't used, because it also restores the counts of its loops: it would count batches,
        and the micro-batches of an optimizer step, from before, although the number of processes may have changed.
        """
        pl_module.resume(checkpoint)
        with reading(f"{self.origin}: the position in the data"):
            self._data(trainer).load_state_dict(checkpoint[StagedDataModule.__qualname__])
        # Gradient scaling of 16-bit training, where there is any.
        precision = trainer.precision_plugin
        precision.load_state_dict(checkpoint.get(type(precision).__qualname__, {}))
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            callback.on_load_checkpoint(trainer, pl_module, dict(checkpoint))
        # A callback of this run takes its state; what is left belongs to callbacks that this run doesn't have.
        states = dict(checkpoint["callbacks"])
        for callback in callbacks:
            if callback.state_key in states:
                with reading(f"{self.origin}: the state of {callback.state_key}"):
                    callback.load_state_dict(deepcopy(states.pop(callback.state_key)))
        if states:
            log.warning("%s holds the state of callbacks that this run hasn't: %s", self.origin, ", ".join(states))

    @staticmethod
    def _data(trainer: L.Trainer) -> StagedDataModule:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, StagedDataModule)
        return data

    def _over(self, trainer: L.Trainer, pl_module: LadderTuningModule) -> bool:
        return self.stage.is_over(pl_module.steps, self._data(trainer).active.position, self.stale)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        self._optimizer_state = None  # it has been loaded into the optimizer
        log.info("stage %s from step %d", self.stage.name, pl_module.steps)
        if self._over(trainer, pl_module):  # the checkpoint was the last one
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        due = pl_module.stepped and pl_module.steps % self.stage.val_every == 0
        trainer.val_check_batch = batch_idx + 1 if due else math.inf
        if pl_module.attempted and self._over(trainer, pl_module):
            trainer.should_stop = True  # Lightning validates and ends the fit

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.state.fn != "fit" or loss is None:
            return
        self.last = float(loss)
        if self.last < self.best - self.stage.min_delta:
            self.best, self.stale = self.last, 0
        else:
            self.stale += 1
        if self._over(trainer, pl_module):
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the optimizer's state for a next stage that begins with it."""
        following = self.stages[self.current + 1 : self.current + 2]
        if following and following[0].keep_optimizer:
            self._optimizer_state = collect_named_state(trainer.optimizers[0], pl_module)

    def state_dict(self) -> dict[str, Any]:
        names = ("first", "last", "best", "stale", "history")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state_dict[name])
