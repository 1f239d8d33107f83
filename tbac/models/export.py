"""Exported folders: what their files are called and hold."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tbac.models.weights import WeightFiles, autoencoder_digest, digest_of, mllm_digest

FORMAT = "tbac-uniimage-1"
PROMPT_EMBEDDINGS = "mllm.prompt_embeddings"


@dataclass
class Provenance:
    """Where the parts came from: what an exported folder or a checkpoint needs to find them again.

    Attributes:
        mllm: hub id or folder of the MLLM with its tokenizer and image processor.
        denoiser: hub id or folder with `transformer/`, `vae/` and `scheduler/`.
        ladder: constructor options of the `Ladder` besides plan and sizes.
        scheduler: config of the base model's sampling scheduler.
        digests: of the frozen parts' files (`mllm`, `autoencoder`) and of `prompt_embeddings` where there are any;
            empty with weights that were never read.
    """

    mllm: str = ""
    denoiser: str = ""
    ladder: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of an exported folder.

    Raises:
        ValueError: when they can't be read.
    """
    try:
        return load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} can't be read ({error})") from None


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
    return files.tensor(PROMPT_EMBEDDINGS)


def compute_digests(mllm: Path, denoiser: Path, depth: int, prompt_embeddings: Tensor | None) -> dict[str, str]:
    """What the frozen parts are known by."""
    digests = {"mllm": mllm_digest(mllm, depth), "autoencoder": autoencoder_digest(denoiser)}
    if prompt_embeddings is not None:
        digests["prompt_embeddings"] = digest_of([(PROMPT_EMBEDDINGS, prompt_embeddings)])
    return digests


def make_absolute(source: str) -> str:
    """A folder's absolute path, so that it is found from everywhere; a hub id as it is."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if source and folder.is_dir() else source
