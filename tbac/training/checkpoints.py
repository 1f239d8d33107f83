"""Finding training checkpoints, and loading their weights into a model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tbac.models import UniImage
from tbac.models.saved import FACTS, SavedModel, check_frozen, read_checkpoint

REFERENCE = "denoiser.reference_embed."
log = logging.getLogger(__name__)


def find_newest_readable(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Find the checkpoint of a run folder that was written last and can be read; returns its path and its content.

    Newer ones that can't be read are skipped with a warning.
    """
    files = [p for p in (Path(folder) / "checkpoints").glob("*-step=*.ckpt") if p.is_file() and not p.is_symlink()]
    for file in sorted(files, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True):
        try:
            return file, read_checkpoint(file)
        except ValueError as error:
            log.warning("passing over a checkpoint: %s", error)
    return None


def find_newest_checkpoint(root: str | Path, stage: str) -> Path | None:
    """Find the checkpoint of `stage` that was written last, anywhere under `root`."""
    files = [p for p in Path(root).glob(f"**/checkpoints/{stage}-step=*.ckpt") if p.is_file()]
    return max(files, key=lambda p: (p.stat().st_mtime_ns, p.name), default=None)


def read_optimizer_state(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the optimizer's state of each parameter, by the parameter's name."""
    state = checkpoint["optimizer_states"][0]["state"]
    return {name: state[i] for i, name in enumerate(checkpoint[FACTS]["optimized"]) if i in state}


def load_weights(saved: SavedModel, model: UniImage) -> None:
    """Load the weights of a saved model into `model`, to train it further.

    The two may have different options, so that a model can be tuned with an option that it was trained without. A model
    that reads references may begin from one that doesn't: their embedding then starts at zero, and changes nothing.

    Raises:
        ValueError: for other frozen parts, other taps, or any missing, unexpected or misshapen tensor, by name.
    """
    config = model.provenance.config
    # Other word embeddings, frozen parts or taps would make the weights worthless without any error.
    if saved.prompt_embeddings is not None and model.mllm.prompt_embeddings is None:
        raise ValueError(
            f"init={saved.origin} reads prompts with a table of its own; give model.prompt_embeddings={saved.origin} "
            "as well"
        )
    check_frozen(saved.frozen_digests or {}, model.provenance.digests, saved.origin)
    if saved.config.taps != config.taps:
        raise ValueError(
            f"{saved.origin} was trained with taps {saved.config.describe_taps()}, this model has "
            f"{config.describe_taps()}"
        )
    # Other options are allowed, but the user should know of them.
    changed = config.list_changes_since(saved.config)
    if changed:
        log.warning("%s was trained with other options: %s", saved.origin, ", ".join(changed))
    state = dict(saved.state)
    if model.denoiser.reference_embed is not None and not any(name.startswith(REFERENCE) for name in state):
        log.warning("%s was trained without references: their embedding starts at zero", saved.origin)
        state |= {name: tensor for name, tensor in model.get_trained_state().items() if name.startswith(REFERENCE)}
    model.load_trained_state(state, saved.origin)


def describe_model(model: UniImage) -> dict[str, Any]:
    """Describe the model for a checkpoint: everything besides its tensors."""
    return {"frozen": model.provenance.digests, "config": {"model": model.provenance.config.to_dict()}}
