"""Finds the shards of a source, and compares them with their manifest."""

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

from tbac.data.tars import BLOCK, TarIndex, has_end_mark
from tbac.files import ForeignFileError, expand_path, parse_json, read_bytes, shorten

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
TASKS = ("generate", "reconstruct")
FINGERPRINT_BYTES = 4096  # of the beginning of each tar


class DataError(ValueError):
    """Training data that can't be used; the message names the file."""


@dataclass(frozen=True)
class Source:
    """A folder of shards in a mixture.

    Args:
        path: the folder, or where it can be downloaded from (`remote.py`).
        split: shards are named `<split>-{000000}.tar`.
        weight: share of the samples drawn from here, relative to the other sources.
        task: `generate` trains on the samples as they are; `reconstruct` on their pictures alone: each is the prompt,
            without a text, and the target.

    Raises:
        ValueError: for a weight that isn't positive, and for another task.
    """

    path: str
    split: str = "train"
    weight: float = 1.0
    task: str = "generate"

    def __post_init__(self) -> None:
        for name in ("path", "split"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} of a source must be text, got {shorten(value)!r}")
        if "/" in self.split:
            raise ValueError(f"the split of source {self.path} is the beginning of file names, got {self.split!r}")
        if self.task not in TASKS:
            raise ValueError(f"the task of source {self.path} must be {' or '.join(TASKS)}, got {shorten(self.task)!r}")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"the weight of source {self.path} must be a positive number, got {shorten(weight)!r}")


def parse_source(fields: Mapping[str, Any] | str) -> Source:
    """Make a `Source` of an entry of the config, which is a mapping or the path alone.

    Raises:
        ValueError: for an entry without `path` or with an unknown field.
    """
    if isinstance(fields, str):
        return Source(fields)
    known = {"path", "split", "weight", "task"}
    if not isinstance(fields, Mapping) or "path" not in fields or not set(fields) <= known:
        raise ValueError(f"a source needs path and may have split, weight and task; got {shorten(fields)!r}")
    return Source(**fields)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the `manifest.json` of a folder; None when it has none.

    Raises:
        DataError: when the file is there but isn't a manifest of a known version.
    """
    content = read_manifest_bytes(folder)
    return None if content is None else parse_manifest(content, folder / MANIFEST)


def read_manifest_bytes(folder: Path) -> bytes | None:
    """Read the bytes of the `manifest.json` of a folder; None when it has none.

    Raises:
        DataError: when the file is there but can't be read.
    """
    file = folder / MANIFEST
    try:
        return read_bytes(file) if file.is_file() else None
    except ForeignFileError as error:
        raise DataError(str(error)) from None


def parse_manifest(content: bytes, file: Path) -> dict[str, Any]:
    """Parse the content of a manifest; `file` is its name, for messages.

    Every field that is used anywhere has the type and the range that it should.

    Raises:
        DataError: when it isn't a manifest of a known version.
    """
    try:
        manifest = parse_json(content, str(file), dict)
    except ForeignFileError as error:
        raise DataError(str(error)) from None
    version = manifest.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise DataError(f"{file}: schema_version must be {SCHEMA_VERSION}, got {shorten(version)!r}")
    for name, (accepted, is_valid) in FIELDS.items():
        if not is_valid(value := manifest.get(name)):
            raise DataError(f"{file}: {name} must be {accepted}, got {shorten(value)!r}")
    for shard, entry in manifest["shards"].items():
        problem = _find_problem(entry)
        if problem:
            raise DataError(f"{file}: the entry of {shorten(shard)!r} {problem}")
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_size_list(value: Any) -> bool:
    """Whether a value is a list of pairs of positive whole numbers."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(size, list) and len(size) == 2 and all(map(_is_side, size)) for size in value)


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _find_problem(entry: Any) -> str:
    """Say what is wrong with the entry of a shard; empty when nothing is."""
    if not isinstance(entry, dict):
        return f"must be an object, got {shorten(entry)!r}"
    for name in ("samples", "bytes"):
        if not _is_count(entry.get(name)):
            return f"needs {name}, a whole number of at least 0; got {shorten(entry.get(name))!r}"
    # Each sample has at least one header, so a tar of so many bytes holds no more of them.
    if entry["samples"] * BLOCK > entry["bytes"]:
        return f"says that {entry['samples']} samples are in {entry['bytes']} bytes"
    digest = entry.get("sha256")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        return f"has a sha256 that isn't 64 hexadecimal digits: {shorten(digest)!r}"
    return ""


# Field of a manifest -> what is accepted in words, and the check. Others are kept as they are.
FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "shards": ("an object", lambda value: isinstance(value, dict)),
    "image_size": ("pixels of a side, or null", lambda value: value is None or _is_side(value)),
    "buckets": ("a list of [height, width], or null", lambda value: value is None or _is_size_list(value)),
    "autoencoder_digest": ("text, or null", lambda value: value is None or isinstance(value, str)),
}


def check_shards(tars: Sequence[Path], listed: Mapping[str, Any], hint: str = "restore it") -> None:
    """Hold the tars of a folder against its manifest, as every tool does before it reads them.

    `data_prep/verify.py` compares all bytes, too.

    Args:
        tars: that are there, at least one.
        listed: name -> entry of the manifest, of all tars that should be there.
        hint: what to do, with which messages end.

    Raises:
        DataError: for a tar that is absent or no regular file, or isn't as its entry says. One without an entry must
            have an end mark.
    """
    check_regular(tars)
    for name in sorted(set(listed) - {tar.name for tar in tars}):
        raise DataError(f"{tars[0].parent / name} is in the manifest but absent; {hint}")
    for tar in tars:
        if tar.name not in listed:
            if not has_end_mark(tar):
                raise DataError(f"shard {tar} is truncated: it lacks the end mark of a tar; {hint}")
            continue
        size, stated = tar.stat().st_size, listed[tar.name]["bytes"]
        if size != stated:
            state = "truncated" if size < stated else "changed"
            raise DataError(f"shard {tar} is {state}: it has {size} bytes, its manifest says {stated}; {hint}")


def check_regular(tars: Iterable[Path]) -> None:
    """Raise DataError for a tar that is a folder, a pipe, a device, or a link to nothing."""
    for tar in tars:
        if not tar.is_file():
            raise DataError(f"shard {tar} isn't a regular file")


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
        self.folder = folder or expand_path(source.path, "path of a source")
        if not self.folder.is_dir():
            raise DataError(
                f"shard folder {self.folder} doesn't exist; stage.sources must name folders of WebDataset tars"
            )
        self.tars = sorted(self.folder.glob(f"{escape(source.split)}-*.tar"))
        if not self.tars:
            raise DataError(f"shard folder {self.folder} holds no {source.split}-*.tar")
        check_regular(self.tars)
        listed: Mapping[str, Any] = {}
        if check_manifest and self.manifest is not None:
            listed = {k: v for k, v in self.manifest["shards"].items() if k.startswith(f"{source.split}-")}
        if check_manifest:
            hint = "restore it, or read what is there with data.check_manifest=false"
            check_shards(self.tars, listed, hint)
        self.samples = [_count_samples(tar, listed) for tar in self.tars]

    @cached_property
    def _manifest_bytes(self) -> bytes | None:
        return read_manifest_bytes(self.folder)

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

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the manifest, and of name, size and first bytes of every tar: it tells replaced data."""
        digest = hashlib.sha256(self._manifest_bytes or b"")
        for tar in self.tars:
            with tar.open("rb") as file:
                digest.update(f"{tar.name} {tar.stat().st_size}".encode() + file.read(FINGERPRINT_BYTES))
        return digest.hexdigest()


def _count_samples(tar: Path, listed: Mapping[str, Any]) -> int:
    """Return the manifest's number of samples of a tar, or count those of a tar that it doesn't list."""
    if tar.name in listed:
        return int(listed[tar.name]["samples"])
    index = TarIndex(tar)
    if index.broken is not None:
        log.warning("skipped the end of %s: the tar breaks off: %s", tar, index.broken)
    return len(index.samples)
