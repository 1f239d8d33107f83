"""The options of a prompt cache, and how it is made for a model: which facts its entries depend on, and where they lie.

What is kept, and how a batch is joined of it, stands in `kept_prompts.py`; the stores in `kept.py`.
"""

import json
import logging
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import transformers

from tbac.files import expand_path, read_bytes
from tbac.models.checks import is_number
from tbac.models.kept import VERSION, FileStore, MemoryStore
from tbac.models.kept_prompts import KeptImages, KeptPrompts, PromptCache
from tbac.models.sources import MLLM_FILES, locate_folder
from tbac.models.uniimage import UniImage
from tbac.models.weights import compute_mllm_digest

log = logging.getLogger(__name__)
GIB = 1024**3
KEEP = ("prompts", "images")


@dataclass(frozen=True)
class PromptCacheConfig:
    """Whether training keeps what the frozen MLLM computes of prompts, and where.

    Attributes:
        keep: `prompts`: what the queries read of whole prompts; `images`: only the features of input images, which take
            less room; None keeps nothing.
        folder: for files that any number of processes and runs share; None = the memory of each training process.
        max_gib: what folder or memory may hold; what doesn't fit is computed each time.

    Raises:
        ValueError: naming the option, its value and what is accepted.
    """

    keep: str | None = None
    folder: str | None = None
    max_gib: float = 8.0

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep not in KEEP:
            raise ValueError(f"prompt_cache.keep must be null or one of {', '.join(KEEP)}; got {self.keep!r}")
        if not is_number(self.max_gib) or not self.max_gib > 0:
            raise ValueError(f"prompt_cache.max_gib must be a number above 0, got {self.max_gib!r}")
        if self.folder is not None:
            folder = expand_path(self.folder, "prompt_cache.folder")
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"prompt_cache.folder={self.folder} must be a folder, and is a file")


def make_prompt_cache(config: PromptCacheConfig, model: UniImage, precision: str) -> PromptCache | None:
    """Make the cache that a config describes, to be given to the loader in place of `model.prompt`.

    Args:
        config: what is kept, and where.
        model: whose MLLM reads the prompts; its `prompt_cache` is set.
        precision: of training, by Lightning's name; what runs under autocast has other numbers.

    Raises:
        ValueError: when weights were made at random, so that nothing says which they are.
    """
    model.prompt_cache = None
    if config.keep is None:
        return None
    facts = describe_circumstances(config.keep, model, precision)
    fingerprint = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    store: FileStore | MemoryStore = MemoryStore(config.max_gib * GIB)
    if config.folder is not None:
        folder = expand_path(config.folder, "prompt_cache.folder") / fingerprint[:16]
        store = FileStore(folder, config.max_gib * GIB)
        store.describe(facts)
        log.info("the prompt cache %s holds %d %s, %.2f GiB", folder, len(store), config.keep, store.bytes / GIB)
    kind = KeptPrompts if config.keep == "prompts" else KeptImages
    plan = model.ladder.plan
    model.prompt_cache = kind(model.prompt, store, fingerprint, plan.deepest, model.ladder.prompt_layers)
    return model.prompt_cache


def describe_circumstances(keep: str, model: UniImage, precision: str) -> dict[str, Any]:
    """Describe all that the numbers of entries depend on, apart from text and images."""
    config, digests = model.provenance.config, model.provenance.digests
    if "mllm" not in digests:
        raise ValueError(
            "prompt_cache.keep needs an MLLM that was read from files; weights made at random have no digest"
        )
    folder = locate_folder("model.mllm", config.mllm, MLLM_FILES)
    # All layers, whatever the deepest tap is: runs that read fewer then share the entries.
    depth = model.mllm.num_layers if keep == "prompts" else 0
    facts = {
        "version": VERSION,
        "keep": keep,
        "mllm": compute_mllm_digest(folder, depth),
        "settings": compute_settings_digest(folder),
        "transformers": transformers.__version__,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "precision": precision,
        "image_pixels": config.image_pixels,
    }
    if keep == "prompts":
        facts |= {"prompt_embeddings": digests.get("prompt_embeddings"), **model.prompt.describe()}
    return facts


def compute_settings_digest(folder: Path) -> str:
    """Compute the digest of an MLLM's config, tokenizer, chat template and image processor: all but its weights."""
    total = sha256()
    files = (file for pattern in ("*.json", "*.txt", "*.jinja") for file in folder.glob(pattern))
    for file in sorted(set(files)):
        content = read_bytes(file)
        total.update(f"{file.name} {len(content)} ".encode())
        total.update(content)
    return total.hexdigest()
