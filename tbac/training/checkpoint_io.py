"""Writing checkpoint files so that one of the final name is always whole."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from tbac.models.checkpoint_file import DIGESTS, FACTS, WRITTEN, compute_digests

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Temporary name, fsync, rename, fsync of the folder.

    A file that can't be written (a full disk) is a logged error that leaves every older file as it was: training goes
    on, and `failed` says what happened to the newest one. `written` is called with the path of each that was.
    """

    def __init__(self) -> None:
        self.written: Callable[[Path], None] = lambda path: None
        self.failed: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint = _sign(checkpoint)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            self.failed = error if isinstance(error, OSError) else OSError(str(error).split("\n")[0])
            temporary.unlink(missing_ok=True)
            log.error("checkpoint %s couldn't be written (%s); older ones are untouched", path, self.failed)
            return
        self.failed = None
        self.written(path)


class BackgroundCheckpointIO(AsyncCheckpointIO):
    """Writes with an `AtomicCheckpointIO` in a thread, so that training goes on meanwhile.

    Lightning's class copies the state where it is, and takes any number of copies; here it is copied to CPU memory,
    and a copy is only made when the one before is on disk.
    """

    def __init__(self) -> None:
        self.writer = AtomicCheckpointIO()
        super().__init__(self.writer)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wait()
        on_cpu = apply_to_collection(checkpoint, torch.Tensor, lambda tensor: tensor.detach().cpu())
        super().save_checkpoint(on_cpu, path, storage_options)

    def wait(self) -> None:
        """Wait until what is being written is on disk."""
        self.teardown()


def _sign(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Add when a checkpoint is written, and the digest of each of its tensors, by which damage is noticed."""
    if FACTS not in checkpoint:
        return checkpoint
    facts = {name: value for name, value in checkpoint[FACTS].items() if name != DIGESTS} | {WRITTEN: time.time()}
    unsigned = {**checkpoint, FACTS: facts}
    return {**checkpoint, FACTS: facts | {DIGESTS: compute_digests(unsigned)}}


def _sync_folder(folder: Path) -> None:
    """Make sure that a file's new name is on disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
