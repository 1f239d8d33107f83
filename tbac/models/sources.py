"""Finding the files of a model's part, which the user names by a hub id or a folder."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tbac.files import expand_path, read_json

MLLM_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
DENOISER_FILES = tuple(
    f"{part}/{name}"
    for part in ("transformer", "vae", "scheduler")
    for name in ("*.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors")
)


class HubUnreachableError(ValueError):
    """A file isn't cached, and the hub doesn't answer."""


def read_config(option: str, source: str, path: str, local_only: bool = False) -> dict[str, Any]:
    """Read a JSON file of a local folder or a hub repository.

    Args:
        option: name of the user's option that gives `source`, for messages.
        source: folder or hub id.
        path: of the file within it.
        local_only: look for files of the hub in the cache only.

    Raises:
        ValueError: when there is no such file, or it isn't JSON that holds a mapping.
    """
    folder = expand_path(source, option)
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
    # A scheduler's config holds -Infinity where nothing is clipped.
    return read_json(file, f"{option}={source}: {path}", dict, finite=False)


def locate_folder(option: str, source: str, patterns: Iterable[str]) -> Path:
    """Return the folder that a source names; a hub repository that isn't cached is downloaded.

    Args:
        option: name of the user's option that gives `source`, for messages.
        source: folder or hub id.
        patterns: files that are downloaded of a hub repository.

    Raises:
        ValueError: when it can't be downloaded.
    """
    folder = expand_path(source, option)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{option}={source}: no such local folder, and its weights are neither cached nor to be downloaded "
            f"({type(error).__name__}); give a local folder with {option}=/path/to/folder"
        ) from None


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files that match `patterns` from one folder to another."""
    for pattern in patterns:
        for file in source.glob(pattern):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
