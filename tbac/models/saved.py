"""What training has made of a model, and the frozen parts that it was made on.

The options in a checkpoint are read into `ModelConfig` as plain data: nothing that a file names is imported or called.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tbac.files import ForeignFileError, expand_path, reading, shorten
from tbac.models.checkpoint_file import FACTS, read_checkpoint
from tbac.models.config import Connector, ModelConfig
from tbac.models.weights import (
    WeightFiles,
    check_tensor,
    compute_autoencoder_digest,
    compute_digest,
    compute_mllm_digest,
)

__all__ = ["FACTS", "SavedModel", "check_frozen", "read_checkpoint", "read_saved_model"]
PROMPT_EMBEDDINGS = "mllm.prompt_embeddings"
FROZEN = ("mllm", "autoencoder", "prompt_embeddings")  # the last one only where prompts are read with another table
# Names in checkpoints from before version 2. They are only compared with, never imported.
OLD_MODEL = "tbac.models.loading.load_model"
OLD_TAP_RULE = "tbac.models.taps.TapRule"


@dataclass(frozen=True)
class SavedModel:
    """A trained model as a checkpoint or an exported folder holds it.

    Attributes:
        config: all options, with the taps resolved.
        frozen_digests: digests of the frozen parts; None if these have already been compared in another way.
        state: tensors of queries, connector and denoiser, by name.
        origin: file or folder that it was read from, for messages.
        prompt_embeddings: word embeddings (token, hidden) for prompts, if they are stored with the weights.
    """

    config: ModelConfig
    frozen_digests: Mapping[str, str] | None
    state: dict[str, Tensor]
    origin: str
    prompt_embeddings: Tensor | None = None


def read_saved_model(checkpoint: Mapping[str, Any], origin: str, connector: Connector | None = None) -> SavedModel:
    """Take the model out of a training checkpoint.

    Args:
        checkpoint: what `read_checkpoint` returned.
        origin: its file or run folder, for messages.
        connector: the user's own connector, if the model was trained with one.

    Raises:
        ValueError: when it doesn't say what the model is made of, or names something that isn't an option.
    """
    facts, state = checkpoint[FACTS], dict(checkpoint["state_dict"])
    options = facts.get("config")
    values = options.get("model") if isinstance(options, Mapping) else None
    if not isinstance(values, Mapping):
        raise ForeignFileError(f"{origin} doesn't say what its model is made of")
    with reading(origin):
        if values.get("_target_") == OLD_MODEL:
            # Before version 2 a checkpoint held the config of the YAML, without the architecture of its denoiser.
            values = resolve_old_taps(values, facts.get("taps"), state)
            config = replace(ModelConfig.from_dict(values, origin, connector), architecture=None)
        else:
            config = ModelConfig.from_dict(values, origin, connector)
    digests = facts.get("frozen")
    if not config.random_init:
        check_frozen_digests(digests, f"{origin}: frozen")
    return SavedModel(config, digests, state, origin)


def check_frozen_digests(digests: Any, place: str) -> None:
    """Raise ForeignFileError unless a file says by digests which frozen parts its model was trained on.

    A part whose digest it lacks is refused by `check_frozen`, when the digest can be compared.

    Args:
        digests: what the file holds.
        place: the file and the name of the part, for messages.
    """
    if not isinstance(digests, Mapping):
        raise ForeignFileError(f"{place} must be a mapping of parts to digests, got {shorten(digests)}")
    for part, digest in digests.items():
        if part not in FROZEN or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ForeignFileError(
                f"{place} must hold the sha256 of {', '.join(FROZEN)}, got {shorten(part)}: {shorten(digest)}"
            )


def resolve_old_taps(values: Mapping[str, Any], taps: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Convert the model's config in a checkpoint from before version 2 to today's keys.

    Args:
        values: the config, with the name of a tap rule.
        taps: the resolved plan that was stored beside it, without the number of blocks.
        state: the checkpoint's tensors, which show the number of blocks.
    """
    known = {key: value for key, value in values.items() if key not in ("_target_", "_convert_")}
    rule = known.get("taps")
    if isinstance(rule, Mapping) and rule.get("_target_") == OLD_TAP_RULE and isinstance(taps, Mapping):
        mix = state.get("ladder.mix_logits")
        num_blocks = len(taps.get("assignment", ())) if mix is None else len(mix)
        known["taps"] = {**taps, "num_blocks": num_blocks}
    return known


def check_frozen(trained_on: Mapping[str, str], present: Mapping[str, str], origin: str) -> None:
    """Compare the frozen parts that a model was trained on with those that it would run on now.

    Args:
        trained_on: digests of the former.
        present: digests of the latter.
        origin: file or folder of the trained model, for messages.

    Raises:
        ValueError: naming the part that differs.
    """
    for part in sorted({*trained_on, *present}):
        if trained_on.get(part) != present.get(part):
            raise ValueError(
                f"{origin} was trained on another {part} (digest {trained_on.get(part, 'none')[:12]}…) than this "
                f"model's ({present.get(part, 'none')[:12]}…)"
            )


def read_prompt_embeddings(folder: str | None, option: str = "model.prompt_embeddings") -> Tensor | None:
    """Read the word embeddings for prompts that an exported folder holds.

    Args:
        folder: the exported folder; None reads none.
        option: name of the user's option that gives it, for messages.

    Raises:
        ValueError: when it holds none.
    """
    if folder is None:
        return None
    file = expand_path(folder, option) / "model.safetensors"
    files = WeightFiles(file.parent) if file.is_file() else None
    if files is None or PROMPT_EMBEDDINGS not in files.file_of:
        raise ValueError(f"{option}={folder}: no exported folder with a table {PROMPT_EMBEDDINGS}")
    table = files.read_tensor(PROMPT_EMBEDDINGS)
    check_tensor(PROMPT_EMBEDDINGS, table, str(file), files.read_digests().get(PROMPT_EMBEDDINGS))
    return table


def compute_digests(mllm: Path, denoiser: Path, depth: int, prompt_embeddings: Tensor | None) -> dict[str, str]:
    """Compute the digests that the frozen parts are known by."""
    digests = {"mllm": compute_mllm_digest(mllm, depth), "autoencoder": compute_autoencoder_digest(denoiser)}
    if prompt_embeddings is not None:
        digests["prompt_embeddings"] = compute_digest([(PROMPT_EMBEDDINGS, prompt_embeddings)])
    return digests
