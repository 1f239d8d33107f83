"""Checkpoints: when they are written, and which are kept."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import callbacks

from tbac.training.checkpoint_io import BackgroundCheckpointIO
from tbac.training.module import LadderTuningModule

log = logging.getLogger(__name__)
NAME = re.compile(r".+-step=(?P<step>\d+)\.ckpt")


class Checkpoint(callbacks.Checkpoint):
    """Writes `<stage>-step=<n>.ckpt` and keeps the newest, the best, and every so many steps one.

    `last.ckpt` and `best.ckpt` are links. Where a validation is due after the same step, the checkpoint is written
    when it is over. Needs `BackgroundCheckpointIO` as the trainer's plugin: a file of the final name is always whole,
    and an older one is removed only once a newer is on disk.

    Args:
        folder: folder of the checkpoints.
        every: optimizer steps between checkpoints.
        keep: how many of the newest ones are kept.
        keep_every: checkpoints whose step is a multiple of this are never removed; null removes them like others.
        monitor: the checkpoint with the smallest value of this metric is kept as the best; null keeps no best one.

    Raises:
        ValueError: for a number below 1.
    """

    def __init__(
        self,
        folder: str,
        every: int,
        keep: int = 2,
        keep_every: int | None = None,
        monitor: str | None = "val/loss",
    ) -> None:
        for name, value in (("every", every), ("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"callbacks.checkpoint.{name} must be at least 1, got {value}")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.keep_every, self.monitor = keep_every, monitor
        self.best: dict[str, Any] | None = None
        self._saved: tuple[str, int] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        writer = trainer.strategy.checkpoint_io
        if stage == "fit" and isinstance(writer, BackgroundCheckpointIO):
            writer.writer.written = self._tidy
            if trainer.is_global_zero:
                # What a process left that was killed while it wrote a checkpoint.
                for unfinished in self.folder.glob("*.ckpt.tmp*"):
                    unfinished.unlink()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        if pl_module.steps:  # the run goes on from a checkpoint of this very moment
            self._saved = (self.name(pl_module), trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write one when it is due, unless a validation comes first: then `on_validation_end` does."""
        assert isinstance(pl_module, LadderTuningModule)
        if not (trainer.should_stop or (pl_module.stepped and pl_module.steps % self.every == 0)):
            return
        if not validation_follows(trainer, batch_idx):
            self.save(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        if trainer.state.fn != "fit" or trainer.sanity_checking or not pl_module.steps:
            return
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        better = False
        if value is not None and (self.best is None or float(value) < self.best["value"]):
            better, self.best = True, {"value": float(value), "name": self.name(pl_module)}
        if better or trainer.should_stop or pl_module.steps % self.every == 0:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last checkpoint. If it can't be written this is an error; during training it is only logged."""
        assert isinstance(pl_module, LadderTuningModule)
        self.save(trainer, pl_module)
        self.finish(trainer)

    @staticmethod
    def finish(trainer: L.Trainer) -> None:
        """Wait until the last one is on disk.

        Raises:
            ValueError: when it couldn't be written.
        """
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, BackgroundCheckpointIO):
            writer.wait()
            error = writer.writer.failed
            if error:
                raise ValueError(f"the last checkpoint couldn't be written: {error}; older ones are untouched")

    @staticmethod
    def name(pl_module: LadderTuningModule) -> str:
        """Make the file name of the checkpoint of this step."""
        return f"{pl_module.stage.name}-step={pl_module.steps}.ckpt"

    def save(self, trainer: L.Trainer, pl_module: LadderTuningModule) -> None:
        """Write a checkpoint, unless there is one of the same moment already."""
        moment = (self.name(pl_module), trainer.global_step)
        if moment != self._saved:
            trainer.save_checkpoint(self.folder / moment[0], weights_only=False)
            self._saved = moment

    def _tidy(self, path: Path) -> None:
        """Link the newest and the best; remove what no rule keeps."""
        best = self.best["name"] if self.best else None
        # Links are a convenience: a file system without them, or without room for one, doesn't end training.
        try:
            _link(path, "last.ckpt")
            if best and (self.folder / best).exists():
                _link(self.folder / best, "best.ckpt")
        except OSError as error:
            log.warning("no link to the newest or the best checkpoint can be made in %s (%s)", self.folder, error)
        stage = path.name.rpartition("-step=")[0]
        named = [(NAME.fullmatch(p.name), p) for p in self.folder.glob(f"{stage}-step=*.ckpt")]
        steps = {int(match["step"]): p for match, p in named if match}
        for step in sorted(steps, reverse=True)[self.keep :]:
            old = steps[step]
            if old.name != best and old != path and not (self.keep_every and step % self.keep_every == 0):
                try:
                    old.unlink(missing_ok=True)
                except OSError as error:
                    log.warning("the old checkpoint %s can't be removed (%s)", old, error)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def validation_follows(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether Lightning validates when this batch is over."""
    return bool(sum(trainer.num_val_batches)) and (trainer.should_stop or trainer.val_check_batch == batch_idx + 1)


def _link(target: Path, name: str) -> None:
    """Point the link `name` beside `target` at it, in one move."""
    new = target.with_name(f".{name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target.name)
    os.replace(new, target.with_name(name))
