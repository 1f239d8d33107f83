"""Models as training checkpoints hold them, read and checked."""

import pickle
from pathlib import Path
from typing import Any

import torch

FACTS = "tbac"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint, with `weights_only`.

    Args:
        path: the file, or a run folder whose `checkpoints/last.ckpt` is meant.

    Raises:
        ValueError: when it doesn't exist or isn't a checkpoint of this project.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "checkpoints" / "last.ckpt"
    if not file.is_file():
        raise ValueError(f"checkpoint {file} doesn't exist")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # read when used
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise ValueError(f"{file} can't be read as a checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict) or FACTS not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(f"{file} isn't a training checkpoint of tbac")
    return checkpoint
