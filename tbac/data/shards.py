"""Finds the shards of a source, and compares them with their manifest."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tbac.data.tars import TarIndex, has_end_mark

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


class DataError(ValueError):
    """Training data that can't be used; the message names the file."""


@dataclass(frozen=True)
class Source:
    """A folder of shards in a mixture.

    Args:
        path: the folder, or where it can be downloaded from (`remote.py`).
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
    """Make a `Source` of an entry of the config.

    Raises:
        ValueError: for an entry without `path` or with an unknown field.
    """
    known = {"path", "split", "weight"}
    if "path" not in fields or not set(fields) <= known:
        raise ValueError(f"a source needs path and may have split and weight; got {dict(fields)}")
    return Source(**fields)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the `manifest.json` of a folder; None when it has none.

    Raises:
        DataError: when the file is there but isn't a manifest of a known version.
    """
    file = folder / MANIFEST
    return parse_manifest(file.read_bytes(), file) if file.is_file() else None


def parse_manifest(content: bytes, file: Path) -> dict[str, Any]:
    """Parse the content of a manifest; `file` is its name, for messages.

    Raises:
        DataError: when it isn't a manifest of a known version.
    """
    try:
        manifest = json.loads(content)
        version = manifest["schema_version"]
        shards = manifest["shards"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a manifest: {error!r}") from None
    if version != SCHEMA_VERSION or not isinstance(shards, dict):
        raise DataError(f"{file}: schema_version must be {SCHEMA_VERSION}, got {version!r}")
    return manifest


class SourceShards:
    """The tars of a source in the order of their names, and how many samples each holds.

    The manifest is read once, when it is first needed.

    Args:
        source: where to look.
        check_manifest: compare names and bytes with the manifest, and take its numbers of samples. Tars that it doesn't
            list must have an end mark. False ignores it and counts the samples of every tar.
        folder: that holds the tars, when it isn't the source's path.

    Attributes:
        folder: that holds the tars.
        tars: their paths.
        samples: how many samples each of them holds.

    Raises:
        DataError: when the folder is absent or holds no tar of the split, or a tar isn't as the manifest says.
    """

    def __init__(self, source: Source, check_manifest: bool = True, folder: Path | None = None) -> None:
        self.source = source
        self.folder = folder or Path(source.path).expanduser()
        if not self.folder.is_dir():
            raise DataError(
                f"shard folder {self.folder} doesn't exist; stage.sources must name folders of WebDataset tars"
            )
        self.tars = sorted(self.folder.glob(f"{source.split}-*.tar"))
        if not self.tars:
            raise DataError(f"shard folder {self.folder} holds no {source.split}-*.tar")
        listed: Mapping[str, Any] = {}
        if check_manifest and self.manifest is not None:
            listed = {k: v for k, v in self.manifest["shards"].items() if k.startswith(f"{source.split}-")}
        if check_manifest:
            self._check_against_manifest(listed)
        self.samples = [_count_samples(tar, listed) for tar in self.tars]

    @cached_property
    def _manifest_bytes(self) -> bytes | None:
        file = self.folder / MANIFEST
        return file.read_bytes() if file.is_file() else None

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest beside the tars, or None where there is none.

        Raises:
            DataError: when the file is there but isn't a manifest of a known version.
        """
        content = self._manifest_bytes
        return None if content is None else parse_manifest(content, self.folder / MANIFEST)

    @property
    def manifest_digest(self) -> str:
        """sha256 of the manifest, or "none" where there is none."""
        content = self._manifest_bytes
        return "none" if content is None else hashlib.sha256(content).hexdigest()

    def _check_against_manifest(self, listed: Mapping[str, Any]) -> None:
        """Raise DataError for a tar that is absent, or isn't as its entry of the manifest says."""
        hint = "restore it, or read what is there with data.check_manifest=false"
        for name in sorted(set(listed) - {tar.name for tar in self.tars}):
            raise DataError(f"{self.folder / name} is in the manifest but absent; {hint}")
        for tar in self.tars:
            if tar.name not in listed:
                if not has_end_mark(tar):
                    raise DataError(f"shard {tar} is truncated: it lacks the end mark of a tar; {hint}")
                continue
            size, stated = tar.stat().st_size, listed[tar.name]["bytes"]
            if size != stated:
                state = "truncated" if size < stated else "changed"
                raise DataError(f"shard {tar} is {state}: it has {size} bytes, its manifest says {stated}; {hint}")


def _count_samples(tar: Path, listed: Mapping[str, Any]) -> int:
    """Return the manifest's number of samples of a tar, or count those of a tar that it doesn't list."""
    if tar.name in listed:
        return int(listed[tar.name]["samples"])
    index = TarIndex(tar)
    if index.broken is not None:
        log.warning("skipped the end of %s: the tar breaks off: %s", tar, index.broken)
    return len(index.samples)
