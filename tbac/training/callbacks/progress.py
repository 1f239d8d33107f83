"""How far training is: a live line on a terminal, and a plain line every so often where there is none."""

import logging
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TextIO

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from tbac.training.module import LadderTuningModule
from tbac.types import Batch

log = logging.getLogger(__name__)


class ProgressLine(L.Callback):
    """Shows step and total, the time that is left, loss, learning rate, gradient norm and samples per second.

    The time that is left follows from all steps so far with what came between them, validations and pictures included.
    Where a stage may end earlier, because its validation loss gets no better, it is the most that is left.

    Args:
        seconds: between two plain lines.
        refresh: seconds between two states of the live line; reading loss and norm makes a GPU wait.
    """

    def __init__(self, seconds: float = 30.0, refresh: float = 0.5) -> None:
        self.seconds, self.refresh = seconds, refresh
        self._live: LiveLine | None = None
        self._began = self._shown = 0.0  # times, by a clock that never goes back
        self._first_step = self._samples = 0
        self._paused = 0.0  # seconds of validations since the last line
        self._pause_began = 0.0
        self._norm: Tensor | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        self._first_step, self._began = pl_module.steps, 0.0
        if trainer.is_global_zero and sys.stderr.isatty():
            self._live = LiveLine(sys.stderr)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        self._norm = pl_module.measure_gradients().total

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        now = time.monotonic()
        if not self._began:  # the first step warms up, and says nothing of the time that is left
            self._began = self._shown = now
            self._first_step, self._samples, self._paused = pl_module.steps, 0, 0.0
            return
        self._samples += len(batch)
        if trainer.is_global_zero and now - self._shown >= (self.refresh if self._live else self.seconds):
            self._show(trainer, pl_module, now)

    def _show(self, trainer: L.Trainer, pl_module: LadderTuningModule, now: float) -> None:
        """Show the state after a step, and begin to count anew."""
        values = self._measure(trainer, now)
        left = self._estimate_rest(pl_module, now)
        if self._live:
            self._live.show(pl_module.stage.name, pl_module.steps, pl_module.total_steps, [left, *values])
        else:
            share = pl_module.steps / max(1, pl_module.total_steps)
            place = f"{pl_module.stage.name} {pl_module.steps}/{pl_module.total_steps} ({share:.0%})"
            log.info("%s, %s: %s", place, left, ", ".join(values))
        self._shown, self._samples, self._paused = now, 0, 0.0

    def _measure(self, trainer: L.Trainer, now: float) -> list[str]:
        loss = trainer.callback_metrics.get("train/loss")
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        busy = max(1e-9, now - self._shown - self._paused)
        values = [f"lr {rate:.3g}"]
        if loss is not None:
            values.insert(0, f"loss {float(loss):.4f}")
        reward = trainer.callback_metrics.get("reinforce/reward")
        if reward is not None:
            values.append(f"reward {float(reward):.3f}")
        if self._norm is not None:
            values.append(f"norm {float(self._norm):.3g}")
        return [*values, f"{self._samples * trainer.world_size / busy:.3g} samples/s"]

    def _estimate_rest(self, pl_module: LadderTuningModule, now: float) -> str:
        done = pl_module.steps - self._first_step
        if done < 1:
            return "? left"
        seconds = (now - self._began) / done * max(0, pl_module.total_steps - pl_module.steps)
        at_most = "at most " if pl_module.stage.patience else ""
        return f"{at_most}{timedelta(seconds=round(seconds))} left"

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause_began = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused += time.monotonic() - self._pause_began
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and trainer.is_global_zero:
            assert isinstance(pl_module, LadderTuningModule)
            log.info("%s, step %d: validation loss %.4f", pl_module.stage.name, pl_module.steps, float(loss))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None


class LiveLine:
    """A line at the bottom of a terminal; what is logged meanwhile scrolls above it.

    Args:
        stream: of the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[words]}"),
            console=Console(file=stream),
        )
        self.progress.start()
        self._task = self.progress.add_task("", total=1, words="")
        # Handlers have noted the streams of before, which the live line has taken the place of.
        plain = [h for h in logging.getLogger().handlers if type(h) is logging.StreamHandler]
        self._handlers = [h for h in plain if not getattr(h.stream, "closed", False)]
        self._streams = [handler.setStream(sys.stderr) for handler in self._handlers]

    def show(self, name: str, step: int, total: int, words: Sequence[str]) -> None:
        """Show a state."""
        self.progress.update(self._task, description=name, completed=step, total=total, words="  ".join(words))

    def stop(self) -> None:
        """Leave the last state there, and give the streams back."""
        self.progress.stop()
        for handler, stream in zip(self._handlers, self._streams, strict=True):
            handler.setStream(stream)
