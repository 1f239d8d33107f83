"""Reading and checking what training has made of a model, from a training checkpoint.

Files are opened as safetensors or with `weights_only`. The options in them are read into `ModelConfig` as plain data:
nothing that a file names is imported or called.
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
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # tensors are read on use
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise ValueError(f"{file} can't be read as a checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict) or FACTS not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(f"{file} isn't a training checkpoint of tbac")
    return checkpoint


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
    values = facts.get("config", {}).get("model")
    if not isinstance(values, Mapping):
        raise ValueError(f"{origin} doesn't say what its model is made of")
    if values.get("_target_") == OLD_MODEL:
        # Before version 2 a checkpoint held the config of the YAML, without the architecture of its denoiser.
        values = resolve_old_taps(values, facts.get("taps"), state)
        config = replace(ModelConfig.from_dict(values, origin, connector), architecture=None)
    else:
        config = ModelConfig.from_dict(values, origin, connector)
    return SavedModel(config, facts["frozen"], state, origin)


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


def read_prompt_embeddings(folder: str | None) -> Tensor | None:
    """Read the word embeddings for prompts that an exported folder holds.

    Raises:
        ValueError: when it holds none.
    """
    if folder is None:
        return None
    file = Path(folder).expanduser() / "model.safetensors"
    files = WeightFiles(file.parent) if file.is_file() else None
    if files is None or PROMPT_EMBEDDINGS not in files.file_of:
        raise ValueError(f"model.prompt_embeddings={folder}: no exported folder with a table {PROMPT_EMBEDDINGS}")
    return files.read_tensor(PROMPT_EMBEDDINGS)


def compute_digests(mllm: Path, denoiser: Path, depth: int, prompt_embeddings: Tensor | None) -> dict[str, str]:
    """Compute the digests that the frozen parts are known by."""
    digests = {"mllm": compute_mllm_digest(mllm, depth), "autoencoder": compute_autoencoder_digest(denoiser)}
    if prompt_embeddings is not None:
        digests["prompt_embeddings"] = compute_digest([(PROMPT_EMBEDDINGS, prompt_embeddings)])
    return digests
