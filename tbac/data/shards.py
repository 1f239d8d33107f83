"""Shards on disk: finding them, and what their manifest says of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


class DataError(ValueError):
    """Training data that can't be used; the message names the file."""


@dataclass(frozen=True)
class Source:
    """A folder of shards in a mixture.

    Args:
        path: the folder.
        split: shards are named `<split>-{000000}.tar`.
        weight: share of the samples drawn from here, relative to the other sources.

    Raises:
        ValueError: for a weight that isn't positive.
    """

    path: str
    split: str = "train"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"the weight of source {self.path} must be positive, got {self.weight}")


def parse_source(fields: Mapping[str, Any]) -> Source:
    """A `Source` from a config entry.

    Raises:
        ValueError: for an entry without `path` or with an unknown field.
    """
    known = {"path", "split", "weight"}
    if "path" not in fields or not set(fields) <= known:
        raise ValueError(f"a source needs path and may have split and weight; got {dict(fields)}")
    return Source(**fields)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's `manifest.json`, or None when it has none.

    Raises:
        DataError: when the file is there but isn't a manifest of a known version.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
        version = manifest["schema_version"]
        shards = manifest["shards"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a manifest: {error!r}") from None
    if version != SCHEMA_VERSION or not isinstance(shards, dict):
        raise DataError(f"{file}: schema_version must be {SCHEMA_VERSION}, got {version!r}")
    return manifest


def ends_properly(shard: Path) -> bool:
    """Whether a tar ends with its two blocks of zeros; one that was cut between two members doesn't."""
    with shard.open("rb") as file:
        file.seek(0, 2)
        file.seek(-min(file.tell(), 1024), 2)
        return file.read() == bytes(1024)


def list_shards(source: Source, check_manifest: bool = True) -> list[Path]:
    """The tars of a source in order of their names.

    Args:
        source: where to look.
        check_manifest: compare names and bytes with the manifest; shards that it doesn't list must end as tars do.

    Raises:
        DataError: when the folder is absent or holds no shard of the split, or a shard isn't as the manifest says.
    """
    folder = Path(source.path).expanduser()
    if not folder.is_dir():
        raise DataError(f"shard folder {folder} doesn't exist; stage.sources must name folders of WebDataset tars")
    shards = sorted(folder.glob(f"{source.split}-*.tar"))
    if not shards:
        raise DataError(f"shard folder {folder} holds no {source.split}-*.tar")
    if check_manifest:
        manifest = read_manifest(folder) or {"shards": {}}
        listed = {k: v for k, v in manifest["shards"].items() if k.startswith(f"{source.split}-")}
        hint = "restore it, or read what is there with data.check_manifest=false"
        for name in sorted(set(listed) - {s.name for s in shards}):
            raise DataError(f"{folder / name} is in the manifest but absent; {hint}")
        for shard in shards:
            if shard.name not in listed and not ends_properly(shard):
                raise DataError(f"shard {shard} is truncated: it lacks the end mark of a tar; {hint}")
            if shard.name in listed and (size := shard.stat().st_size) != (stated := listed[shard.name]["bytes"]):
                state = "truncated" if size < stated else "changed"
                raise DataError(f"shard {shard} is {state}: it has {size} bytes, its manifest says {stated}; {hint}")
    return shards
