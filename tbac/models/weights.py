"""Files of weights: finding them, listing their tensors, computing their digest, and reading some of the tensors.

A frozen part is known by the digest of the tensors in its files. So it counts as the same part whatever type or
quantisation it is loaded with, and its digest is computed tensor by tensor, without loading the whole part.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

STEMS = ("model", "diffusion_pytorch_model")


def strip_mllm_prefix(name: str) -> str:
    """Remove the prefixes that versions of the library put before a tensor's name: `layers.0…`, `visual…`."""
    return re.sub(r"^(model\.)?(language_model\.)?(model\.)?", "", name)


def select_mllm_tensors(depth: int) -> Callable[[str], bool]:
    """Make the test whether conditioning reads a tensor: word embeddings, vision tower, the first `depth` layers."""

    def is_read(name: str) -> bool:
        name = strip_mllm_prefix(name)
        layer = re.match(r"layers\.(\d+)\.", name)
        return int(layer[1]) < depth if layer else name.startswith(("embed_tokens.", "visual."))

    return is_read


class WeightFiles:
    """The safetensors files of one folder.

    Args:
        folder: with `model.safetensors` or `diffusion_pytorch_model.safetensors`, or several with their index.

    Raises:
        ValueError: when there are none, or one can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        for stem in STEMS:
            single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
            if single.is_file():
                files = [single]
            elif index.is_file():
                files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
            else:
                continue
            for file in files:
                with _open(file) as opened:
                    self.file_of.update(dict.fromkeys(opened.keys(), file))
            return
        raise ValueError(
            f"{folder} has no weights: neither {' nor '.join(f'{s}.safetensors' for s in STEMS)}, whole or sharded"
        )

    def read_shapes(self) -> dict[str, tuple[int, ...]]:
        """Read the shape of every tensor, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.file_of.values())):
            with _open(file) as opened:
                shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
        return shapes

    def read_tensor(self, name: str) -> Tensor:
        """Read one tensor, as stored; only its own file is opened."""
        with _open(self.file_of[name]) as opened:
            return opened.get_tensor(name)

    def read(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Read the tensors whose names are `wanted`, as stored."""
        tensors: dict[str, Tensor] = {}
        for file in sorted(set(self.file_of.values())):
            with _open(file) as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys() if wanted(name)})  # noqa: SIM118
        return tensors

    def compute_digest(
        self, wanted: Callable[[str], bool] = lambda name: True, rename: Callable[[str], str] = lambda name: name
    ) -> str:
        """Compute the sha256 over names, types, shapes and bytes of `wanted` tensors, ordered by their (new) names."""
        names = sorted((n for n in self.file_of if wanted(n)), key=rename)
        return compute_digest((rename(name), self.read_tensor(name)) for name in names)


def compute_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Compute the sha256 over names, types, shapes and bytes of tensors, in the order given."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def compute_autoencoder_digest(denoiser: Path) -> str:
    """Compute the digest of the autoencoder in a denoiser folder's `vae/`, by which manifests name it."""
    return WeightFiles(denoiser / "vae").compute_digest()


def compute_mllm_digest(mllm: Path, depth: int) -> str:
    """Compute the digest of what conditioning reads of an MLLM, up to layer `depth`."""
    return WeightFiles(mllm).compute_digest(select_mllm_tensors(depth), strip_mllm_prefix)


def _open(file: Path) -> safe_open:
    try:
        return safe_open(str(file), "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} can't be read as safetensors ({error})") from None
