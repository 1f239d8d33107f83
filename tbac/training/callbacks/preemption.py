"""Saving a checkpoint and stopping when a signal comes, and putting the job back into the cluster's queue."""

import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch import callbacks

from tbac.distributed import find_max_over_ranks
from tbac.training.callbacks.checkpoint import Checkpoint, validation_follows
from tbac.training.interruptions import INTERRUPTION
from tbac.training.module import LadderTuningModule

log = logging.getLogger(__name__)


class Preemption(callbacks.Checkpoint):
    """When a signal has come to any process, writes a checkpoint after the current step and ends the run.

    The same command goes on from there. If a validation follows the step, the run ends after it. Before the first step
    of a stage nothing is unsaved, so the run ends at once. A signal that comes again within a second is the same one; a
    later one has its usual effect. Must come after `Checkpoint` in the list of callbacks.

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
        stop: Sequence[str] = ("SIGTERM", "SIGINT", "SIGHUP"),
        requeue: Sequence[str] = ("SIGUSR1",),
    ) -> None:
        for name in [*stop, *requeue]:
            if name not in signal.Signals.__members__:
                raise ValueError(f"callbacks.preemption: {name!r} isn't the name of a signal, such as SIGTERM")
        self.stop = [signal.Signals[name] for name in stop]
        self.requeue = [signal.Signals[name] for name in requeue]

    @property
    def signals(self) -> list[signal.Signals]:
        """All signals that it obeys."""
        return [*self.stop, *self.requeue]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end_now_if_told(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_signals(trainer)
        if trainer.state.fn == "validate":  # the validation before a stage's first step
            self._end_now_if_told(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_signals(trainer)
        self._end_now_if_told(trainer)
        INTERRUPTION.may_end = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The stage's last checkpoint is on disk now, so the run may end in the hand-over to the next stage."""
        self._end_now_if_told(trainer)
        INTERRUPTION.may_end = trainer.world_size == 1

    def _take_signals(self, trainer: L.Trainer) -> None:
        """Take the place of Lightning's handlers, which would save in the middle of a step."""
        INTERRUPTION.take(self.signals)
        if trainer.world_size > 1:  # all processes must decide to end at the same place
            INTERRUPTION.may_end = False

    def _end_now_if_told(self, trainer: L.Trainer) -> None:
        """End the run at a moment at which nothing is unsaved, if a signal has come to any process."""
        received = find_max_over_ranks(INTERRUPTION.received or 0, trainer.strategy.root_device)
        if received:
            self._end(trainer, signal.Signals(received), "all that was done is saved")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        if pl_module.attempted and not validation_follows(trainer, batch_idx):
            self.stop_if_told(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        if trainer.state.fn == "fit" and pl_module.steps and not trainer.should_stop:
            self.stop_if_told(trainer, pl_module)

    def stop_if_told(self, trainer: L.Trainer, pl_module: LadderTuningModule) -> None:
        """If a signal has come to any process, write a checkpoint and end the run; all processes must call this."""
        received = find_max_over_ranks(INTERRUPTION.received or 0, trainer.strategy.root_device)
        if not received:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint):
                callback.save(trainer, pl_module)
                callback.finish(trainer)
        done = f"after step {pl_module.steps} of stage {pl_module.stage.name}; the same command goes on from there"
        self._end(trainer, signal.Signals(received), done)

    def _end(self, trainer: L.Trainer, received: signal.Signals, done: str) -> NoReturn:
        # The first process's exit status is the run's. If another one failed, the launcher would kill the rest.
        if not trainer.is_global_zero:
            raise SystemExit(0)
        self.end(received, done)

    def end(self, received: signal.Signals, done: str) -> NoReturn:
        """End the run as a signal asks for.

        Args:
            received: the signal.
            done: when it was obeyed, for the message.
        """
        log.warning("stopped by %s %s", received.name, done)
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
