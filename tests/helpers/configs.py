"""Composes the configs of the repository."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).parents[2]
REQUIRED = {  # what a command has no default for
    "app": ["out=x"],
    "answer": ["checkpoint=x", "question=x"],
    "cache_latents": ["path=x", "out=x", "denoiser=x"],
    "cache_prompts": ["run_dir=.", "prompt_cache.folder=x"],
    "convert": ["dataset=folder", "dataset.path=x", "out=x"],
    "evaluate": ["checkpoint=x", "out=x"],
    "export": ["checkpoint=x", "out=x"],
    "generate": ["checkpoint=x", "out=."],
    "study/quantization": ["checkpoint=x"],
    "import_official": ["checkpoint=x", "mllm=x", "denoiser=x", "out=x"],
    "sweep": ["name=taps_x_lr"],
    "train": ["run_dir=."],
    "verify": ["path=x"],
}


@cache
def _compose_once(name: str, overrides: tuple[str, ...]) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, list(overrides))


def compose_config(name: str, *overrides: str) -> Any:
    """Compose a config of the repository; that is done once in a session, and every caller gets a copy."""
    return copy.deepcopy(_compose_once(name, overrides))
