"""Files of weights: finding them, listing their tensors, computing their digest, and reading some of the tensors.

A frozen part is known by the digest of the tensors in its files. So it counts as the same part whatever type or
quantisation it is loaded with, and its digest is computed tensor by tensor, without loading the whole part.

What this project writes has a digest for each tensor in the file itself. So a bit that a disk or a copy has flipped is
noticed when the file is read, and the tensor is named.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tbac.files import ForeignFileError, parse_json, read_json, reading, shorten

STEMS = ("model", "diffusion_pytorch_model")
DIGESTS = "tbac_digests"  # key of the metadata of a safetensors file: JSON of each tensor's name and digest


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
                files = read_index(index)
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

    def read_digests(self) -> dict[str, str]:
        """Read the digests that the files hold of their tensors, by name; there are none in files of others."""
        digests: dict[str, str] = {}
        for file in sorted(set(self.file_of.values())):
            with _open(file) as opened:
                digests.update(read_digests(opened.metadata(), str(file)))
        return digests

    def read_tensor(self, name: str) -> Tensor:
        """Read one tensor, as stored; only its own file is opened."""
        file = self.file_of[name]
        with _open(file) as opened, reading(f"{name} of {file}"):
            return opened.get_tensor(name)

    def read(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Read the tensors whose names are `wanted`, as stored."""
        tensors: dict[str, Tensor] = {}
        for file in sorted(set(self.file_of.values())):
            with _open(file) as opened, reading(str(file)):
                tensors.update({name: opened.get_tensor(name) for name in opened.keys() if wanted(name)})  # noqa: SIM118
        return tensors

    def compute_digest(
        self, wanted: Callable[[str], bool] = lambda name: True, rename: Callable[[str], str] = lambda name: name
    ) -> str:
        """Compute the sha256 over names, types, shapes and bytes of `wanted` tensors, ordered by their (new) names.

        Raises:
            ForeignFileError: for a tensor that holds NaN or an infinite number, by name: no model works with it.
        """
        names = sorted((n for n in self.file_of if wanted(n)), key=rename)

        def read_checked(name: str) -> tuple[str, Tensor]:
            tensor = self.read_tensor(name)
            check_finite(name, tensor, str(self.file_of[name]))
            return rename(name), tensor

        return compute_digest(map(read_checked, names))


def read_index(index: Path) -> list[Path]:
    """Read which files of its folder an index of sharded weights names.

    Raises:
        ForeignFileError: when it isn't such an index, or names a file elsewhere.
    """
    names = read_json(index, kind=dict).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ForeignFileError(f"{index}: weight_map must map names of tensors to files, got {shorten(names)}")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ForeignFileError(f"{index}: weight_map must name .safetensors files beside it, got {shorten(name)!r}")
    return sorted({index.parent / name for name in names.values()})


def compute_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Compute the sha256 over names, types, shapes and bytes of tensors, in the order given."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def check_finite(name: str, tensor: Tensor, place: str) -> None:
    """Raise ForeignFileError for a tensor that holds NaN or an infinite number.

    Args:
        name: of the tensor.
        tensor: of any type; one of whole numbers is always finite.
        place: the file, for messages.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if tensor.element_size() == 1:  # numbers of 8 bits can't be added up
        tensor = tensor.float()
    # A sum is finite only if all of its terms are, and takes no memory; one that overflows is looked at in full.
    if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
        raise ForeignFileError(f"{place}: {name} holds NaN or infinite numbers")


def check_tensor(name: str, tensor: Tensor, place: str, digest: str | None = None, finite: bool = True) -> None:
    """Check a tensor that has been read from a file.

    Args:
        name: of the tensor.
        tensor: what was read.
        place: the file, for messages.
        digest: what `compute_digest` gave for this tensor when the file was written; None if the file doesn't say.
        finite: refuse NaN and infinite numbers.

    Raises:
        ForeignFileError: when it isn't a plain tensor that the file really holds, isn't finite, or has another digest.
    """
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    if not plain or tensor.is_quantized or tensor.is_complex():
        kind = f"{type(tensor).__name__}, {tensor.layout}, {tensor.dtype}"
        raise ForeignFileError(f"{place}: {name} must be a plain tensor of real numbers, got {kind}")
    # A pickle may claim that one stored number is a tensor of any size.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ForeignFileError(f"{place}: {name} has shape {tuple(tensor.shape)}, which is more than what is stored")
    if digest is not None and compute_digest([(name, tensor)]) != digest:
        raise ForeignFileError(
            f"{place} is damaged: {name} isn't what was written there (another digest); use another copy of the file"
        )
    if finite:
        check_finite(name, tensor, place)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file with a digest for each tensor; it has its name only when it is whole."""
    # safetensors stores contiguous tensors on the CPU only.
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digests = {name: compute_digest([(name, tensor)]) for name, tensor in stored.items()}
    temporary = file.with_name(f".{file.name}.partial")
    try:
        temporary.touch()
        usual_mode = temporary.stat().st_mode
        save_file(stored, temporary, metadata={"format": "pt", DIGESTS: json.dumps(digests)})
        temporary.chmod(usual_mode)  # the library lets nobody else read its files, whatever the umask is
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read a whole safetensors file, and check each tensor.

    Raises:
        ForeignFileError: when it can't be read, or a tensor isn't what was written, isn't finite or isn't of floating
            point numbers; by name.
    """
    with _open(file) as opened, reading(str(file)):
        digests = read_digests(opened.metadata(), str(file))
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name in sorted({*digests, *tensors} if digests else ()):
            if name not in tensors or name not in digests:
                what = "lacks" if name in digests else "has the additional"
                raise ForeignFileError(f"{file} is damaged: it {what} tensor {name}")
        for name, tensor in tensors.items():
            check_tensor(name, tensor, str(file), digests.get(name))
            if not tensor.is_floating_point():
                raise ForeignFileError(f"{file}: {name} must hold floating point numbers, got {tensor.dtype}")
    return tensors


def read_digests(metadata: Mapping[str, str] | None, place: str) -> dict[str, str]:
    """Read the digests in the metadata of a safetensors file; empty where it has none, as one written by others."""
    text = (metadata or {}).get(DIGESTS)
    return {} if text is None else parse_json(text, f"{place}: {DIGESTS}", dict)


def compute_autoencoder_digest(denoiser: Path) -> str:
    """Compute the digest of the autoencoder in a denoiser folder's `vae/`, by which manifests name it."""
    return WeightFiles(denoiser / "vae").compute_digest()


def compute_mllm_digest(mllm: Path, depth: int) -> str:
    """Compute the digest of what conditioning reads of an MLLM, up to layer `depth`."""
    return WeightFiles(mllm).compute_digest(select_mllm_tensors(depth), strip_mllm_prefix)


def _open(file: Path) -> safe_open:
    with reading(str(file), "safetensors"):
        if not file.is_file():
            raise ForeignFileError(f"{file} can't be read as safetensors (it isn't there, or isn't a file)")
        return safe_open(str(file), "pt")
