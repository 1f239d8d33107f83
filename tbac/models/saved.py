"""What training has made of a model, as training checkpoints hold it and exported folders do, read and checked.

Files are opened as safetensors or with `weights_only`. What they say of the model is read into `ModelConfig`; nothing
that they name is imported or called.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbac.models.config import Connector, ModelConfig
from tbac.models.weights import WeightFiles, compute_autoencoder_digest, compute_digest, compute_mllm_digest

FACTS = "tbac"
PROMPT_EMBEDDINGS = "mllm.prompt_embeddings"
# What checkpoints of before version 2 named in place of a resolved plan; both are only ever compared.
OLD_MODEL = "tbac.models.loading.load_model"
OLD_TAP_RULE = "tbac.models.taps.TapRule"


@dataclass(frozen=True)
class SavedModel:
    """What training has made of a model.

    Attributes:
        config: all options, with the taps resolved.
        frozen_digests: what the frozen parts are known by; None where they have been compared by other means.
        state: tensors of queries, connector and denoiser, by name.
        origin: file or folder, for messages.
        prompt_embeddings: the table (token, hidden) that prompts are read with, where it is stored with the weights.
    """

    config: ModelConfig
    frozen_digests: Mapping[str, str] | None
    state: dict[str, Tensor]
    origin: str
    prompt_embeddings: Tensor | None = None


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


def read_saved_model(checkpoint: Mapping[str, Any], origin: str, connector: Connector | None = None) -> SavedModel:
    """The model that a training checkpoint holds.

    Args:
        checkpoint: of `read_checkpoint`.
        origin: its file or run folder, for messages.
        connector: the user's own, where the model was trained with one.

    Raises:
        ValueError: when it doesn't say what the model is made of, or names something that isn't an option.
    """
    facts, state = checkpoint[FACTS], dict(checkpoint["state_dict"])
    values = facts.get("config", {}).get("model")
    if not isinstance(values, Mapping):
        raise ValueError(f"{origin} doesn't say what its model is made of")
    if values.get("_target_") == OLD_MODEL:
        # Before version 2 the config was that of the YAML, and the architecture was read from the denoiser's folder.
        values = resolve_old_taps(values, facts.get("taps"), state)
        config = replace(ModelConfig.from_dict(values, origin, connector), architecture=None)
    else:
        config = ModelConfig.from_dict(values, origin, connector)
    return SavedModel(config, facts["frozen"], state, origin)


def resolve_old_taps(values: Mapping[str, Any], taps: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model's config of a checkpoint of before version 2, as one of today.

    Args:
        values: as it was composed, with a tap rule.
        taps: the plan beside it, which had no number of blocks.
        state: the checkpoint's tensors.
    """
    known = {key: value for key, value in values.items() if key not in ("_target_", "_convert_")}
    rule = known.get("taps")
    if isinstance(rule, Mapping) and rule.get("_target_") == OLD_TAP_RULE and isinstance(taps, Mapping):
        mix = state.get("ladder.mix_logits")
        num_blocks = len(taps.get("assignment", ())) if mix is None else len(mix)
        known["taps"] = {**taps, "num_blocks": num_blocks}
    return known


def check_frozen(known: Mapping[str, str], own: Mapping[str, str], origin: str) -> None:
    """Compare the frozen parts that something was trained on with those at hand.

    Args:
        known: digests of what it was trained on.
        own: digests of what is at hand.
        origin: what was trained, for messages.

    Raises:
        ValueError: naming the part that differs.
    """
    for part in sorted({*known, *own}):
        if known.get(part) != own.get(part):
            raise ValueError(
                f"{origin} was trained on another {part} (digest {known.get(part, 'none')[:12]}…) than this model's "
                f"({own.get(part, 'none')[:12]}…)"
            )


def read_prompt_embeddings(folder: str | None) -> Tensor | None:
    """The table that an exported folder reads prompts with, as stored.

    Raises:
        ValueError: when the folder has none.
    """
    if folder is None:
        return None
    file = Path(folder).expanduser() / "model.safetensors"
    files = WeightFiles(file.parent) if file.is_file() else None
    if files is None or PROMPT_EMBEDDINGS not in files.file_of:
        raise ValueError(f"model.prompt_embeddings={folder}: no exported folder with a table {PROMPT_EMBEDDINGS}")
    return files.read_tensor(PROMPT_EMBEDDINGS)


def compute_digests(mllm: Path, denoiser: Path, depth: int, prompt_embeddings: Tensor | None) -> dict[str, str]:
    """What the frozen parts are known by."""
    digests = {"mllm": compute_mllm_digest(mllm, depth), "autoencoder": compute_autoencoder_digest(denoiser)}
    if prompt_embeddings is not None:
        digests["prompt_embeddings"] = compute_digest([(PROMPT_EMBEDDINGS, prompt_embeddings)])
    return digests
