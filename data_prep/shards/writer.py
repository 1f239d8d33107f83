"""Writes WebDataset shards with a manifest."""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save as save_safetensors
from torch import Tensor
from webdataset.writer import TarWriter

from tbac.data.shards import MANIFEST, SCHEMA_VERSION, read_manifest
from tbac.files import write_whole


def encode_field(name: str, value: Any) -> bytes:
    """Encode the value of a field, an image by the field's extension; bytes stay as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        extension = name.rsplit(".", 1)[-1]
        value.save(buffer, {"jpg": "jpeg"}.get(extension, extension))
        return buffer.getvalue()
    if isinstance(value, Tensor):
        return save_safetensors({"latents": value.contiguous()})
    return json.dumps(value).encode()


class _HashedFile:
    """A file that is hashed and counted while it is written."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())  # what is said to be done must be there after a power cut
        self.file.close()


class ShardWriter:
    """Writes one tar, whose bytes depend on its samples alone, and which gets its name only when it is complete.

    The fields of a sample are sorted by name, as WebDataset writes them.

    Args:
        path: of the tar.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.samples = path, 0
        self._partial = path.with_name(f"{path.name}.partial")
        self._file = _HashedFile(self._partial)
        # Without time and user, the same samples give the same bytes.
        self._tar = TarWriter(self._file, user="", group="", mode=0o644, mtime=0, encoder=False)

    def add(self, key: str, fields: Mapping[str, Any]) -> None:
        """Add a sample: field -> image, text, JSON, latents, or bytes.

        Raises:
            ValueError: for a key that WebDataset would split, or a field that it would leave out.
        """
        if not key or "." in key or "/" in key:
            raise ValueError(f"sample key {key!r} must hold neither a dot nor a slash")
        hidden = [name for name in fields if name.startswith("_")]
        if hidden:
            raise ValueError(f"field {hidden[0]!r} of sample {key!r} must not begin with an underscore")
        encoded = {name: encode_field(name, value) for name, value in fields.items()}
        self._tar.write({"__key__": key, **encoded})
        self.samples += 1

    def close(self) -> dict[str, Any]:
        """Finish the tar; returns its entry of the manifest."""
        self._tar.close()
        self._file.close()
        self._partial.rename(self.path)
        return {"samples": self.samples, "bytes": self._file.size, "sha256": self._file.digest.hexdigest()}


def write_shards(
    folder: Path,
    split: str,
    samples: Iterable[tuple[str, Mapping[str, Any]]],
    samples_per_shard: int,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write `<split>-{000000}.tar` files and add them to the folder's `manifest.json`.

    Args:
        folder: made when absent.
        split: name of the split.
        samples: (key, field -> value) pairs; keys hold no dot or slash.
        samples_per_shard: how many samples go into one tar.
        facts: further fields of the manifest, such as `provenance` and `autoencoder_digest`.

    Raises:
        ValueError: for a key that WebDataset would split.
    """
    # Another split may have been written before, and shares the manifest.
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / MANIFEST
    manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "shards": {}}
    manifest = read_manifest(folder) or manifest
    manifest.update(facts or {})
    # A tar is opened for its first sample, so none stays empty.
    shards, writer, index = manifest["shards"], None, 0
    for key, fields in samples:
        if writer is None:
            writer = ShardWriter(folder / f"{split}-{index:06d}.tar")
        writer.add(key, fields)
        if writer.samples == samples_per_shard:
            shards[writer.path.name] = writer.close()
            writer, index = None, index + 1
    if writer is not None:
        shards[writer.path.name] = writer.close()
    write_whole(file, (json.dumps(manifest, indent=2) + "\n").encode())
