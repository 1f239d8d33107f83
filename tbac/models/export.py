"""Exported folders: `model.safetensors`, `config.json`, a model card, and the frozen parts if asked."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tbac import __version__
from tbac.models.card import is_hub_id, make_model_card
from tbac.models.config import Connector, ModelConfig
from tbac.models.saved import PROMPT_EMBEDDINGS, SavedModel
from tbac.models.sources import DENOISER_FILES, MLLM_FILES, copy_files, locate_folder

FORMAT = "tbac-uniimage-2"
OLD_FORMAT = "tbac-uniimage-1"
FILES = ("config.json", "model.safetensors", "mllm/*", "denoiser/vae/*")
AUTOENCODER_FILES = tuple(name for name in DENOISER_FILES if name.startswith("vae/"))
MLLM, DENOISER = "mllm", "denoiser"  # folders of the frozen parts within a standalone export


def find_export(source: str | Path) -> Path:
    """The local folder of an export, downloaded from the hub where `source` is a hub id and no folder."""
    folder = Path(source).expanduser()
    if folder.is_dir() or not is_hub_id(str(source)):
        return folder
    return locate_folder("model", str(source), FILES)


def read_export(folder: Path, connector: Connector | None = None) -> SavedModel:
    """The model that an exported folder holds.

    Args:
        folder: of `write_export`.
        connector: the user's own, where the model was trained with one.

    Raises:
        ValueError: when it isn't an export, or its config or its tensors can't be read.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not an exported model: it has no config.json")
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} isn't JSON ({error})") from None
    known = values.pop("format", None) if isinstance(values, dict) else None
    if known not in (FORMAT, OLD_FORMAT):
        raise ValueError(f"{file}: format must be {FORMAT!r}, got {known!r}")
    digests = values.pop("frozen_digests", None)
    if not isinstance(digests, dict):
        raise ValueError(f"{file}: frozen_digests must be a mapping, got {digests!r}")
    values.pop("tbac_version", None)
    config = ModelConfig.from_dict(convert_old(values) if known == OLD_FORMAT else values, str(file), connector)
    # A standalone folder holds the frozen parts itself.
    mllm = str(folder / MLLM) if config.mllm == MLLM else config.mllm
    denoiser = str(folder / DENOISER) if config.denoiser == DENOISER else config.denoiser
    state = read_state(folder)
    table = state.pop(PROMPT_EMBEDDINGS, None)
    return SavedModel(replace(config, mllm=mllm, denoiser=denoiser), digests, state, str(folder), table)


def convert_old(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an export of format 1, which had sources and the denoiser's config in mappings of their own."""
    if not isinstance(values.get("mllm"), Mapping) or not isinstance(values.get("denoiser"), Mapping):
        return dict(values)
    mllm, denoiser = values["mllm"], values["denoiser"]
    kept = {name: value for name, value in values.items() if name != "scheduler"}
    return kept | {
        "mllm": mllm.get("source"),
        "denoiser": denoiser.get("source"),
        "reference_latents": denoiser.get("references", False),
        "architecture": {"transformer": denoiser.get("config"), "scheduler": values.get("scheduler")},
    }


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of an exported folder.

    Raises:
        ValueError: when they can't be read.
    """
    try:
        return load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} can't be read ({error})") from None


def write_export(
    saved: SavedModel, folder: Path, standalone: bool = False, notes: Mapping[str, Any] | None = None
) -> None:
    """Write an exported folder.

    Args:
        saved: what it shall hold.
        folder: made where it doesn't exist.
        standalone: also copy the frozen parts' files, so that the folder loads without network.
        notes: more rows for the model card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, state = saved.config, dict(saved.state)
    if saved.prompt_embeddings is not None:
        state[PROMPT_EMBEDDINGS] = saved.prompt_embeddings
    # Folders are to be found from everywhere.
    mllm, denoiser = make_absolute(config.mllm), make_absolute(config.denoiser)
    if standalone:
        copy_files(locate_folder("mllm", config.mllm, MLLM_FILES), folder / MLLM, MLLM_FILES)
        copy_files(locate_folder("denoiser", config.denoiser, DENOISER_FILES), folder / DENOISER, AUTOENCODER_FILES)
        mllm, denoiser = MLLM, DENOISER
    # The table of word embeddings is in the export itself.
    written = replace(config, mllm=mllm, denoiser=denoiser, prompt_embeddings=None)
    values = {
        "format": FORMAT,
        "tbac_version": __version__,
        **written.to_dict(),
        "frozen_digests": dict(saved.frozen_digests or {}),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    card = make_model_card(values, [config.mllm, config.denoiser], standalone, notes or {})
    (folder / "README.md").write_text(card)


def make_absolute(source: str) -> str:
    """A folder's absolute path, so that it is found from everywhere; a hub id as it is."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if source and folder.is_dir() else source
