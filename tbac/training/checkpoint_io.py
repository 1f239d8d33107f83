"""Writing checkpoint files so that one of the final name is always whole."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.plugins.io import TorchCheckpointIO

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Temporary name, fsync, rename, fsync of the folder; by default in the background.

    A file that can't be written (a full disk) is a logged error that leaves every older file as it was: training goes
    on, and `failed` says what happened to the newest one.

    Args:
        background: copy the state and write it in a thread, so that training goes on meanwhile.
    """

    def __init__(self, background: bool = True) -> None:
        self.background = background
        self.written: Callable[[Path], None] = lambda path: None
        self.failed: OSError | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wait()  # one at a time, in order
        if not self.background:
            self._write(checkpoint, Path(path))
            return
        self._executor = self._executor or ThreadPoolExecutor(1, "checkpoint")
        copied = apply_to_collection(checkpoint, torch.Tensor, lambda t: t.detach().to("cpu", copy=True))
        self._pending = self._executor.submit(self._write, copied, Path(path))

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            self.failed = error if isinstance(error, OSError) else OSError(str(error).split("\n")[0])
            temporary.unlink(missing_ok=True)
            log.error("checkpoint %s couldn't be written (%s); older ones are untouched", path, self.failed)
            return
        self.failed = None
        self.written(path)

    def wait(self) -> None:
        """Wait until what is being written is on disk."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def teardown(self) -> None:
        self.wait()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
