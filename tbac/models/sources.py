"""Where a part of the model lies: a hub id or a folder, and its files."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

MLLM_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
DENOISER_FILES = tuple(
    f"{part}/{name}"
    for part in ("transformer", "vae", "scheduler")
    for name in ("*.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors")
)


class HubUnreachableError(ValueError):
    """A file that isn't cached, while the hub doesn't answer."""


def read_config(option: str, source: str, path: str, local_only: bool = False) -> dict[str, Any]:
    """A JSON file of a local folder or a hub repository; with `local_only` the hub isn't asked."""
    folder = Path(source).expanduser()
    hint = f"give a local folder with {option}=/path/to/folder"
    if folder.is_dir():
        file = folder / path
        if not file.is_file():
            raise ValueError(f"{option}={source}: the folder has no {path}; {hint} that has one")
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
        try:
            file = Path(hf_hub_download(source, path, local_files_only=local_only))
        except (HfHubHTTPError, HFValidationError, EntryNotFoundError, LocalEntryNotFoundError, OSError) as error:
            kind = HubUnreachableError if isinstance(error, LocalEntryNotFoundError) else ValueError
            raise kind(
                f"{option}={source}: no such local folder, and {path} of the hub repository {source} is neither cached "
                f"nor to be downloaded ({type(error).__name__}); {hint}"
            ) from None
    else:
        raise ValueError(f"{option}={source}: no such folder; {hint}, or a hub id such as owner/name")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{option}={source}: {path} isn't JSON ({error})") from None


def locate_folder(option: str, source: str, patterns: Iterable[str]) -> Path:
    """The folder of a local path or of a hub repository, downloaded where it isn't cached.

    Args:
        option: what the user calls it, for messages.
        source: folder or hub id.
        patterns: files that are wanted of a hub repository.

    Raises:
        ValueError: when the hub doesn't give it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{option}={source}: no such local folder, and its weights are neither cached nor to be downloaded "
            f"({type(error).__name__}); give a local folder with {option}=/path/to/folder"
        ) from None


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy what matches `patterns` from one folder to another, bytes unchanged."""
    for pattern in patterns:
        for file in source.glob(pattern):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
