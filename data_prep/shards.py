"""Writing WebDataset shards with a manifest."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save as save_safetensors
from torch import Tensor

from tbac.data.shards import MANIFEST, SCHEMA_VERSION


def encode_field(name: str, value: Any) -> bytes:
    """Bytes of a field by its extension: images, text, JSON, latents."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, {"jpg": "jpeg"}.get(name.rsplit(".", 1)[-1], name.rsplit(".", 1)[-1]))
        return buffer.getvalue()
    if isinstance(value, Tensor):
        return save_safetensors({"latents": value.contiguous()})
    return json.dumps(value).encode()


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
        samples_per_shard: how many go into one tar.
        facts: further fields of the manifest, such as `provenance` and `autoencoder_digest`.

    Raises:
        ValueError: for a key that WebDataset would split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / MANIFEST
    manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "shards": {}}
    if file.is_file():
        manifest = json.loads(file.read_text())
    manifest.update(facts or {})
    batch: list[tuple[str, Mapping[str, Any]]] = []
    index = 0

    def flush() -> None:
        nonlocal index, batch
        if batch:
            name = f"{split}-{index:06d}.tar"
            manifest["shards"][name] = _write_tar(folder / name, batch)
            index, batch = index + 1, []

    for key, fields in samples:
        if "." in key or "/" in key:
            raise ValueError(f"sample key {key!r} must hold neither a dot nor a slash")
        batch.append((key, fields))
        if len(batch) == samples_per_shard:
            flush()
    flush()
    file.write_text(json.dumps(manifest, indent=2) + "\n")


def _write_tar(path: Path, samples: list[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Write one tar whose bytes depend on its content alone; returns its entry of the manifest."""
    temporary = path.with_suffix(".partial")
    with tarfile.open(temporary, "w") as tar:
        for key, fields in samples:
            for name, value in fields.items():
                data = encode_field(name, value)
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    content = temporary.read_bytes()
    temporary.rename(path)
    return {"samples": len(samples), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
