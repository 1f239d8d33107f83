"""Folders of runs: their names, and that no two runs share one."""

import fcntl
import itertools
import logging
import os
import re
import shlex
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from omegaconf import OmegaConf

from tbac.redaction import hide_in_text

log = logging.getLogger(__name__)
# Overrides that don't belong to an experiment: they change no point's name, unless a sweep varies them.
NOT_OF_THE_EXPERIMENT = (
    "machine", "logger", "debug", "callbacks", "trainer", "hydra", "sweep", "parent_run_id", "resume", "submit",
)  # fmt: skip
LOCK = ".lock"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in the order in which Lightning looks


def read_launched_rank() -> int | None:
    """Read this process's number as its launcher has set it; None for a process that was started by itself."""
    for name in RANKS:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return None


def name_point(overrides: Sequence[str], varied: Collection[str] = (), limit: int = 120) -> str:
    """Name the folder of one point of a sweep by its overrides; points with different overrides have different names.

    Args:
        overrides: each `key=value`. Those that don't belong to the experiment are left out, unless they are varied.
        varied: keys that the sweep varies.
        limit: longest name in bytes; a longer one is cut.
    """
    distinguishing = []

    def read_key(override: str) -> str:
        return override.partition("=")[0].lstrip("+~")

    # What is varied comes first, so that it isn't what a long name loses.
    for override in sorted(overrides, key=lambda one: (read_key(one) not in varied, one)):
        key = read_key(override)
        if key in varied or re.split(r"[./@]", key)[0] not in NOT_OF_THE_EXPERIMENT:
            distinguishing.append(override)
    whole = ",".join(distinguishing) or "default"
    name = re.sub(r"[/\s\0]", "_", hide_in_text(whole))
    if name == whole and len(name.encode()) <= limit:
        return name
    # What was replaced or cut off is still told apart, by its digest.
    cut = name.encode()[: limit - 9].decode(errors="ignore")
    return f"{cut}_{sha256(whole.encode()).hexdigest()[:8]}"


def make_new_folder(parent: str) -> str:
    """Make a folder that is named by date and time; if there is one of this second already, a number follows.

    Processes that a launcher has started together take the same name, and leave it to the first use to make it.
    """
    stamp = Path(parent) / datetime.now().strftime("%Y-%m-%d_%H%M%S")
    if read_launched_rank() is not None:
        return str(stamp)
    for number in itertools.count(1):
        folder = stamp if number == 1 else stamp.with_name(f"{stamp.name}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return str(folder)
    raise AssertionError("numbers don't end")


def split_words(*texts: str | None) -> list[str]:
    """Split texts into words as a shell would, and return the words of all texts in one list; None has no words."""
    words = []
    for text in texts:
        words += shlex.split(text or "")
    return words


OmegaConf.register_new_resolver("new_folder", make_new_folder, replace=True, use_cache=True)
OmegaConf.register_new_resolver("shell_words", split_words, replace=True)


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone, for a block. The system lets go of it when the process ends in any way.

    Of processes that a launcher has started together, only the first one holds it, for all of them.

    Raises:
        ValueError: when another process holds it; names that process.
    """
    if read_launched_rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            # Not flock: loader workers would inherit that lock, and hold it after a kill of this process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{folder} is in use by {holder}; wait for its end, or give another folder") from None
        except OSError as error:  # a file system without locks
            log.warning("%s can't be locked (%s): nothing tells when a second process writes there", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}")
        file.flush()
        yield
