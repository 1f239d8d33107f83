"""What lets diffusers' own `DiffusionPipeline.from_pretrained` open an exported folder.

It reads `model_index.json`, which names a class for each component. Ours are named by two small modules in the folder,
which diffusers runs only with `trust_remote_code=True`. Nothing of this is read by `UniImagePipeline.from_pretrained`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

PIPELINE = """# For DiffusionPipeline.from_pretrained(folder, trust_remote_code=True), with the package tbac installed.
from tbac.sampling import UniImagePipeline

__all__ = ["UniImagePipeline"]
"""
MODEL = """# For diffusers, which loads each component from a folder of its own: the model lies in the folder above.
from pathlib import Path

import torch

from tbac.models import UniImage as Model


class UniImage(Model):
    @classmethod
    def from_pretrained(cls, folder, torch_dtype=None):
        return Model.from_pretrained(Path(folder).parent, dtype=torch_dtype or torch.float32)
"""


def write_index(folder: Path, scheduler: Mapping[str, Any] | None) -> None:
    """Write `model_index.json` and what it names.

    Args:
        folder: of the export.
        scheduler: config of the scheduler, with its class.
    """
    config = dict(scheduler or {})
    index = {
        "_class_name": ["pipeline", "UniImagePipeline"],
        "_diffusers_version": diffusers.__version__,
        "model": ["uniimage", "UniImage"],
        "scheduler": ["diffusers", config.get("_class_name")] if config else [None, None],
    }
    for name in ("model", "scheduler"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "pipeline.py").write_text(PIPELINE)
    (folder / "model" / "uniimage.py").write_text(MODEL)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2) + "\n")
