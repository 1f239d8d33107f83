"""Callbacks that cause faults on purpose. Batches are counted from 0 in each process that starts."""

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from tbac.distributed import get_local_part, get_rank
from tbac.training.callbacks import Callback


class Fault(Callback):
    """A fault on one process, or on all, at some batches.

    Args:
        batches: the batches at which it happens.
        on_rank: the process on which it happens; None for all.
        once: a file that is made when the fault happens, and prevents it when the run is started again.
    """

    def __init__(self, batches: Sequence[int], on_rank: int | None = None, once: str | None = None) -> None:
        self.batches, self.on_rank, self.once = set(batches), on_rank, once

    def due(self, batch_idx: int) -> bool:
        if batch_idx not in self.batches or self.on_rank not in (None, get_rank()):
            return False
        if self.once is None:
            return True
        if os.path.exists(self.once):
            return False
        with open(self.once, "w"):
            return True


class SpoiltBatch(Fault):
    """Latents become NaN, or `scale` times as large."""

    def __init__(self, batches: Sequence[int], scale: float = float("nan"), **options: Any) -> None:
        super().__init__(batches, **options)
        self.scale = float(scale)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.due(batch_idx):
            batch.latents = batch.latents * self.scale


class SpoiltGradient(Fault):
    """One gradient becomes infinite, or all of them `scale` times as large and rounded through half precision.

    It happens as the backward pass ends, before processes average their gradients.
    """

    def __init__(self, batches: Sequence[int], kind: Literal["inf", "half"] = "inf", **options: Any) -> None:
        super().__init__(batches, **options)
        self.kind = kind
        self._spoil = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.register_hook(self._hook)

    def _hook(self, gradient: torch.Tensor) -> torch.Tensor:
        if not self._spoil:
            return gradient
        if self.kind == "inf":
            return torch.full_like(gradient, float("inf"))
        return (gradient * 2.0**16 * 1e6).half().to(gradient.dtype) / 2.0**16  # a loss scale that overflows

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._spoil = self.due(batch_idx)


class Signal(Fault):
    """The process gets a signal: SIGKILL as when a machine fails, SIGTERM as when a cluster wants it back."""

    def __init__(self, batches: Sequence[int], name: str = "SIGKILL", **options: Any) -> None:
        super().__init__(batches, **options)
        self.number = signal.Signals[name]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.due(batch_idx):
            os.kill(os.getpid(), self.number)


class SignalAt(Callback):
    """A signal comes at a moment of a stage.

    Args:
        stage: name of the stage.
        moment: `setup`, `first_validation`, `train_start`, `batch`, `last_batch`, `validation`, `train_end`, `fit_end`
            or `teardown`. In `batch` it comes in the middle of the third step, in `last_batch` in that of the last one.
        name: of the signal.
        times: how often it comes, one after the other.
        group: whether it goes to the whole group of processes, as Ctrl-C does.
        once: a file that is made when it happens, and prevents it when the run is started again.
    """

    def __init__(
        self, stage: str, moment: str, once: str, name: str = "SIGTERM", times: int = 1, group: bool = False
    ) -> None:
        self.stage, self.moment, self.once = stage, moment, once
        self.number, self.times, self.group = signal.Signals[name], times, group

    def _send(self, pl_module: Any, moment: str) -> None:
        if moment != self.moment or pl_module.stage.name != self.stage or os.path.exists(self.once):
            return
        with open(self.once, "w"):
            pass
        for _ in range(self.times):
            send = os.killpg if self.group else os.kill
            send(os.getpgrp() if self.group else os.getpid(), self.number)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":  # the stage is entered after this, by the last callback
            self._send(pl_module, "setup")

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._send(pl_module, "validation" if trainer.state.fn == "fit" else "first_validation")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._send(pl_module, "train_start")

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if pl_module.steps == 2:
            self._send(pl_module, "batch")
        if pl_module.steps + 1 == pl_module.stage.steps:
            self._send(pl_module, "last_batch")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._send(pl_module, "train_end")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._send(pl_module, "fit_end")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._send(pl_module, "teardown")


class KilledWorker(Fault):
    """A loader process is killed, as when memory is short."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.due(batch_idx):
            children = multiprocessing.active_children()
            assert children, "the run has no loader processes"
            os.kill(children[0].pid or 0, signal.SIGKILL)


class Stuck(Fault):
    """The process hangs."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.due(batch_idx):
            time.sleep(1e6)


class LeftOut(Fault):
    """The optimizer step of these batches isn't taken. A run with rejected steps must end as one with this."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.due(trainer.fit_loop.epoch_loop.batch_idx):
            pl_module.reject_step()


class Spread(Callback):
    """Asserts that all processes hold the same weights at the end."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        total = torch.stack([get_local_part(p.detach()).double().sum() for p in pl_module.parameters()]).sum()
        sums = trainer.strategy.all_gather(total)
        assert bool((sums == sums.flatten()[0]).all()), sums


class DiskFull(Fault):
    """Files can't grow beyond 64 KiB between the two batches: what writing on a full disk is like."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        first, last = sorted(self.batches)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if batch_idx == first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        if batch_idx == last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class Filled(Fault):
    """A file system has no space left from the first batch to the second one; the file `filling` takes it up."""

    def __init__(self, batches: Sequence[int], folder: str, **options: Any) -> None:
        super().__init__(batches, **options)
        self.file = Path(folder) / "filling"

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        first, last = sorted(self.batches)
        if batch_idx == first:
            with contextlib.suppress(OSError), self.file.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
        if batch_idx == last:
            self.file.unlink(missing_ok=True)


class Removed(Fault):
    """A file is deleted."""

    def __init__(self, batches: Sequence[int], path: str, **options: Any) -> None:
        super().__init__(batches, **options)
        self.path = Path(path)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.due(batch_idx):
            self.path.unlink(missing_ok=True)


class Deleted(Fault):
    """Every training shard of a folder goes away; a name ending in `.deleted` remains."""

    def __init__(self, batches: Sequence[int], folder: str, **options: Any) -> None:
        super().__init__(batches, **options)
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.due(batch_idx):
            for file in self.folder.glob("train-*.tar"):
                file.rename(f"{file}.deleted")


class Slow(Callback):
    """Every batch takes longer.

    Args:
        seconds: how much longer.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(self.seconds)
