"""What a model that training has made is known by, without opening the frozen parts that it stands on."""

from pathlib import Path

from tbac.files import expand_path
from tbac.models.checkpoint_file import WEIGHTS, read_checkpoint
from tbac.models.uniimage import TRAINED
from tbac.models.weights import WeightFiles, compute_digest


def compute_trained_digest(path: str | Path) -> str:
    """Compute the sha256 over the trained tensors of an exported folder, a run folder or a training checkpoint.

    A checkpoint and its export in the same type of numbers have the same digest.

    Raises:
        ValueError: when there is none at `path`, or it can't be read.
    """
    folder = expand_path(path, "checkpoint")
    if (folder / "config.json").is_file():
        return WeightFiles(folder).compute_digest(lambda name: name.split(".")[0] in TRAINED)
    return compute_digest(sorted(read_checkpoint(folder, only_weights=True)[WEIGHTS].items()))
