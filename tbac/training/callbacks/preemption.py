"""Saving a checkpoint and stopping when a signal comes, and putting the job back into the cluster's queue."""

import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch import callbacks

from tbac.distributed import find_max_over_ranks
from tbac.training.callbacks.checkpoint import Checkpoint, validation_follows
from tbac.training.module import LadderTuningModule

log = logging.getLogger(__name__)


class Preemption(callbacks.Checkpoint):
    """When a signal has come to any process, writes a checkpoint after the current step and ends the run.

    The same command goes on from there. A second signal of the same kind has its usual effect. If a validation follows
    the step, the run ends after it. Must come after `Checkpoint` in the list of callbacks.

    Args:
        stop: names of signals that end the run with exit status 128 + number, as if they had not been handled.
        requeue: names of signals that also put the SLURM job back into its queue, such as the one that
            `sbatch --signal` sends before the time limit. SIGTERM does so too when it comes because another job takes
            this one's place, but not when the job is cancelled.

    Raises:
        ValueError: for a name that isn't a signal's.
    """

    def __init__(
        self,
        stop: Sequence[str] = ("SIGTERM", "SIGINT"),
        requeue: Sequence[str] = ("SIGUSR1",),
    ) -> None:
        for name in [*stop, *requeue]:
            if name not in signal.Signals.__members__:
                raise ValueError(f"callbacks.preemption: {name!r} isn't the name of a signal, such as SIGTERM")
        self.stop = [signal.Signals[name] for name in stop]
        self.requeue = [signal.Signals[name] for name in requeue]
        self._received: signal.Signals | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_signals()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take signals already in the validation before a stage's first step."""
        self._take_signals()

    def _take_signals(self) -> None:
        """Take the place of Lightning's handlers, which would save in the middle of a step."""
        if self._received is not None:  # a second signal has its usual effect
            return
        if threading.current_thread() is threading.main_thread():  # Python allows it in no other thread
            for number in [*self.stop, *self.requeue]:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        if pl_module.attempted and not validation_follows(trainer, batch_idx):
            self._stop_if_told(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        if trainer.state.fn == "fit" and pl_module.steps and not trainer.should_stop:
            self._stop_if_told(trainer, pl_module)

    def _stop_if_told(self, trainer: L.Trainer, pl_module: LadderTuningModule) -> None:
        received = find_max_over_ranks(self._received or 0, trainer.strategy.root_device)
        if not received:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint):
                callback.save(trainer, pl_module)
                callback.finish(trainer)
        # The first process's exit status is the run's. If another one failed, the launcher would kill the rest.
        if not trainer.is_global_zero:
            raise SystemExit(0)
        log.warning(
            "stopped by %s after step %d of stage %s; the same command goes on from there",
            signal.Signals(received).name,
            pl_module.steps,
            pl_module.stage.name,
        )
        if received in self.requeue or (received == signal.SIGTERM and slurm_job_runs_on()):
            requeue_slurm_job()
        raise SystemExit(128 + received if received in self.stop else 0)


def read_slurm_job() -> str | None:
    """Read the number of the SLURM job that this process belongs to."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def slurm_job_runs_on() -> bool:
    """Whether SLURM still counts this job as running: then SIGTERM gives it time before another job takes its place.

    A job that was cancelled gets the same signal, and is no longer running for SLURM.
    """
    job = read_slurm_job()
    if job is None or shutil.which("scontrol") is None:
        return False
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    return "JobState=RUNNING" in shown


def requeue_slurm_job() -> None:
    """Put this job back into its queue; it then starts anew under the same number."""
    job = read_slurm_job()
    if job is None or shutil.which("scontrol") is None:
        log.warning("this isn't a SLURM job, so it can't be put back into a queue")
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        log.error("scontrol requeue %s failed: %s", job, done.stderr.strip())
    else:
        log.warning("SLURM job %s is back in its queue", job)
