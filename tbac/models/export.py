"""Reading and writing exported folders: tensors, `config.json`, a model card and, if asked for, the frozen parts."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tbac import __version__
from tbac.files import ForeignFileError, expand_path, read_json, shorten, write_whole
from tbac.models.card import is_hub_id, make_model_card
from tbac.models.config import Connector, ModelConfig
from tbac.models.diffusers_index import write_index
from tbac.models.saved import PROMPT_EMBEDDINGS, SavedModel, check_frozen_digests
from tbac.models.sources import DENOISER_FILES, MLLM_FILES, copy_files, locate_folder
from tbac.models.weights import load_tensors, save_tensors

FORMAT = "tbac-uniimage-2"
OLD_FORMAT = "tbac-uniimage-1"
FILES = ("config.json", "model.safetensors", *(f"mllm/{name}" for name in MLLM_FILES), "denoiser/vae/*")
AUTOENCODER_FILES = tuple(name for name in DENOISER_FILES if name.startswith("vae/"))
MLLM, DENOISER = "mllm", "denoiser"  # folders of the frozen parts within a standalone export


def find_export(source: str | Path) -> Path:
    """Return the local folder of an export; one that `source` names by its hub id is downloaded."""
    folder = expand_path(source, "model")
    if folder.is_dir() or not is_hub_id(str(source)):
        return folder
    return locate_folder("model", str(source), FILES)


def read_export(folder: Path, connector: Connector | None = None) -> SavedModel:
    """Read the model that an exported folder holds.

    Args:
        folder: what `write_export` wrote.
        connector: the user's own connector, if the model was trained with one.

    Raises:
        ValueError: when it isn't an export, or its config or its tensors can't be read.
    """
    # Is it an export, and one of a format that this version reads?
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not an exported model: it has no config.json")
    values = read_json(
        file, kind=dict, finite=False
    )  # a scheduler may have -Infinity; others are checked by their fields
    file_format = values.pop("format", None)
    if file_format not in (FORMAT, OLD_FORMAT):
        raise ForeignFileError(f"{file}: format must be {FORMAT!r}, got {shorten(file_format)!r}")
    # Digests and version aren't options of the model, so they are taken out before the options are read.
    digests = values.pop("frozen_digests", None)
    check_frozen_digests(digests, f"{file}: frozen_digests")
    values.pop("tbac_version", None)
    if file_format == OLD_FORMAT:
        values = convert_old(values)
    config = ModelConfig.from_dict(values, str(file), connector)
    # A standalone folder names its own subfolders, wherever it lies now.
    mllm = str(folder / MLLM) if config.mllm == MLLM else config.mllm
    denoiser = str(folder / DENOISER) if config.denoiser == DENOISER else config.denoiser
    state = read_state(folder)
    table = state.pop(PROMPT_EMBEDDINGS, None)
    return SavedModel(replace(config, mllm=mllm, denoiser=denoiser), digests, state, str(folder), table)


def convert_old(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the config of an export of format 1, in which `mllm` and `denoiser` were mappings, to today's keys."""
    if not isinstance(values.get("mllm"), Mapping) or not isinstance(values.get("denoiser"), Mapping):
        return dict(values)
    mllm, denoiser = values["mllm"], values["denoiser"]
    unchanged = {name: value for name, value in values.items() if name != "scheduler"}
    return unchanged | {
        "mllm": mllm.get("source"),
        "denoiser": denoiser.get("source"),
        "reference_latents": denoiser.get("references", False),
        "architecture": {"transformer": denoiser.get("config"), "scheduler": values.get("scheduler")},
    }


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an exported folder.

    Raises:
        ValueError: when they can't be read, are damaged, aren't finite or aren't floating point numbers; by name.
    """
    return load_tensors(folder / "model.safetensors")


def write_export(
    saved: SavedModel, folder: Path, standalone: bool = False, notes: Mapping[str, Any] | None = None
) -> None:
    """Write an exported folder.

    Args:
        saved: the model that is written.
        folder: is made if it doesn't exist.
        standalone: also copy the frozen parts' files, so that the folder loads without network.
        notes: more rows for the model card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, state = saved.config, dict(saved.state)
    if saved.prompt_embeddings is not None:
        state[PROMPT_EMBEDDINGS] = saved.prompt_embeddings
    # Sources become absolute paths, so that they are found from any working directory.
    mllm, denoiser = make_absolute(config.mllm), make_absolute(config.denoiser)
    if standalone:
        copy_files(locate_folder("mllm", config.mllm, MLLM_FILES), folder / MLLM, MLLM_FILES)
        copy_files(locate_folder("denoiser", config.denoiser, DENOISER_FILES), folder / DENOISER, AUTOENCODER_FILES)
        mllm, denoiser = MLLM, DENOISER
    # The table of word embeddings is among the tensors, so the folder that it came from isn't named.
    written = replace(config, mllm=mllm, denoiser=denoiser, prompt_embeddings=None)
    values = {
        "format": FORMAT,
        "tbac_version": __version__,
        **written.to_dict(),
        "frozen_digests": dict(saved.frozen_digests or {}),
    }
    save_tensors(state, folder / "model.safetensors")
    # A folder is an export by its config.json, so this comes when the weights are there.
    write_whole(folder / "config.json", (json.dumps(values, indent=2) + "\n").encode())
    write_index(folder, written.architecture.scheduler if written.architecture else None)
    card = make_model_card(values, [config.mllm, config.denoiser], standalone, notes or {})
    (folder / "README.md").write_text(card)


def make_absolute(source: str) -> str:
    """Make a folder's path absolute, so that it is found from any working directory; a hub id is returned as it is."""
    folder = expand_path(source, "the path of a frozen part")
    return str(folder.resolve()) if folder.is_dir() else source
